// L1 and GIoU costs of boxes, for CPU and CUDA; projects/dn_detr/losses/matching_costs.py has them
// in PyTorch. V is T or a vector of T. No include guard: included once per instruction set.

// Divisors are clamped to at least this, as in layers/box_ops.py.
constexpr double SMALLEST_AREA = 1e-9;

// A box and its corners.
template <typename V>
struct MatchBox {
  V cx, cy, w, h, x0, y0, x1, y1, area;
};

template <typename V>
DN_DETR_HOST_DEVICE V larger(const V& a, const V& b) {
  return a < b ? b : a;
}

template <typename V>
DN_DETR_HOST_DEVICE V smaller(const V& a, const V& b) {
  return b < a ? b : a;
}

template <typename V>
DN_DETR_HOST_DEVICE MatchBox<V> match_box(const V& cx, const V& cy, const V& w, const V& h) {
  MatchBox<V> box{cx, cy, w, h, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, V{}};
  box.area = larger(box.x1 - box.x0, V{}) * larger(box.y1 - box.y0, V{});
  return box;
}

template <typename V>
DN_DETR_HOST_DEVICE V distance(const V& a, const V& b) {
  return a < b ? b - a : a - b;
}

// Weighted L1 distance minus generalized IoU (1902.09630).
template <typename T, typename V>
DN_DETR_HOST_DEVICE V box_cost(const MatchBox<V>& a, const MatchBox<T>& object, T l1, T giou) {
  const MatchBox<V> b{V{} + object.cx, V{} + object.cy, V{} + object.w,
                      V{} + object.h,  V{} + object.x0, V{} + object.y0,
                      V{} + object.x1, V{} + object.y1, V{} + object.area};
  const V sum = distance(a.cx, b.cx) + distance(a.cy, b.cy) + distance(a.w, b.w) +
      distance(a.h, b.h);
  const V common = larger(smaller(a.x1, b.x1) - larger(a.x0, b.x0), V{}) *
      larger(smaller(a.y1, b.y1) - larger(a.y0, b.y0), V{});
  const V both = a.area + b.area - common;
  const V hull = larger(larger(a.x1, b.x1) - smaller(a.x0, b.x0), V{}) *
      larger(larger(a.y1, b.y1) - smaller(a.y0, b.y0), V{});
  const V least = V{} + static_cast<T>(SMALLEST_AREA);
  const V overlap = common / larger(both, least) - (hull - both) / larger(hull, least);
  return l1 * sum - giou * overlap;
}
