// From the dtype of a call to the kernels compiled for it.

#include "kernels.h"

template <class T>
void normalize_of(const Input&, const Normalize&);
template <class T>
void gradient_sums_of(const Input&, const Gradient&, GradientSums);
template <class T>
void gradient_input_of(const Input&, const Gradient&, const GradientInput&);

void normalize(const Input& input, const Normalize& call) {
  if (input.view.elements == 0) return;
  by_dtype(input.dtype, [&](auto* type) { normalize_of<std::remove_pointer_t<decltype(type)>>(input, call); });
}

void gradient_sums(const Input& input, const Gradient& call, GradientSums out) {
  if (input.view.elements == 0) {
    for (int64_t c = 0; c < input.view.channels; ++c) out.shift[c] = out.g[c] = out.d[c] = out.gd[c] = 0;
    return;
  }
  by_dtype(input.dtype,
           [&](auto* type) { gradient_sums_of<std::remove_pointer_t<decltype(type)>>(input, call, out); });
}

void gradient_input(const Input& input, const Gradient& call, const GradientInput& out) {
  if (input.view.elements == 0) return;
  by_dtype(input.dtype,
           [&](auto* type) { gradient_input_of<std::remove_pointer_t<decltype(type)>>(input, call, out); });
}
