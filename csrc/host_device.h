// Marks functions that run on the host and, compiled by nvcc, on the device.
#pragma once

#if defined(__CUDACC__)
#define DN_DETR_HOST_DEVICE __host__ __device__ inline
#else
#define DN_DETR_HOST_DEVICE inline
#endif
