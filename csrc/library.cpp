// Schemas of all operators, and the stub that makes the library importable. Kernels are registered
// at the end of their own files; fake kernels and gradients are in Python.

#include <Python.h>

#include <torch/library.h>

extern "C" {
#if defined(_WIN32)
__declspec(dllexport)
#else
__attribute__((visibility("default")))
#endif
PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
}

// Sizes are SymInt, although kernels take integers: with int, every image size would recompile.
TORCH_LIBRARY(dn_detr, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "deformable_attention(Tensor value, SymInt[] spatial_shapes, Tensor valid_sizes, "
      "Tensor reference, Tensor offsets, Tensor logits, Tensor? padding) -> Tensor");
  m.def(
      "deformable_attention_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor valid_sizes, Tensor reference, Tensor offsets, Tensor logits, Tensor? padding, "
      "bool needs_reference) -> (Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, "
      "Tensor grad_logits)");
  m.def(
      "noise_objects(Tensor labels, Tensor boxes, Tensor is_object, Tensor noise_seeds, "
      "SymInt num_groups, SymInt slots_per_group, SymInt num_classes, float box_noise, "
      "float label_noise, bool contrastive, SymInt num_matched, ScalarType mask_dtype, "
      "bool hide_empty) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "matching_costs(Tensor logits, Tensor boxes, Tensor image_of, Tensor labels, "
      "Tensor object_boxes, float class_cost, float l1, float giou, bool is_softmax, float alpha, "
      "float gamma) -> Tensor");
  m.def(
      "assign_objects(Tensor[] costs, Tensor image_of, SymInt batch, Tensor?[] is_empty, "
      "SymInt[] num_groups, SymInt[] matches_per_object) -> (Tensor[], Tensor[])");
  m.def("has_nonfinite(Tensor values, Tensor? is_empty) -> Tensor");
}

// Noise has no gradient. Without the fallthrough, PyTorch would prepare a warning in every call.
TORCH_LIBRARY_IMPL(dn_detr, Autograd, m) {
  m.impl("noise_objects", torch::CppFunction::makeFallthrough());
}
