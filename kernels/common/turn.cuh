// Rotary embedding of a pair of elements.
#pragma once

namespace anabranch {

// cos and sin of an angle that is a float: the product of position and frequency is rounded as the reference rounds it.
// Turns are counted in float64, because at position 100,000 a float32 reduction would lose the fraction, and sincospif
// takes no slow path.
__device__ __forceinline__ void cos_sin(float angle, float& cos, float& sin) {
  const double turns = static_cast<double>(angle) * 0.15915494309189535;
  sincospif(2.0f * static_cast<float>(turns - rint(turns)), &sin, &cos);
}

__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  const float turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

}  // namespace anabranch
