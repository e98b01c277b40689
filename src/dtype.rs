//! Data types of stored weights.

use std::fmt;

/// How a weight or activation is stored. Arithmetic on the CPU is always float32 (or float64 in tests).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes: float32's exponent with 7 bits of fraction.
    Bf16,
    /// FP8 E4M3FN, 1 byte: 4 exponent and 3 fraction bits, no infinity, largest value 448.
    F8E4m3,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4m3 => "f8_e4m3",
        })
    }
}

/// Value of an E4M3FN code (1 sign, 4 exponent with bias 7, 3 fraction; 0x7f and 0xff are NaN).
pub const fn f8e4m3_to_f32(code: u8) -> f32 {
    let exponent = (code >> 3) & 0xf;
    let fraction = (code & 7) as u32;
    let sign = ((code & 0x80) as u32) << 24;
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    if exponent == 0 {
        // Subnormal: fraction * 2^-9.
        let magnitude = fraction as f32 * (1.0 / 512.0);
        return if sign == 0 { magnitude } else { -magnitude };
    }
    f32::from_bits(sign | ((exponent as u32 + 120) << 23) | (fraction << 20))
}

/// Every E4M3FN code's value, for table lookup while dequantising.
pub(crate) static F8E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = f8e4m3_to_f32(code as u8);
        code += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::f8e4m3_to_f32;

    #[test]
    fn e4m3_landmarks() {
        assert_eq!(f8e4m3_to_f32(0x7e), 448.0);
        assert_eq!(f8e4m3_to_f32(0xfe), -448.0);
        assert_eq!(f8e4m3_to_f32(0x38), 1.0);
        assert_eq!(f8e4m3_to_f32(0x01), 0.001_953_125);
        assert_eq!(f8e4m3_to_f32(0x08), 0.015_625);
        assert!(f8e4m3_to_f32(0x7f).is_nan() && f8e4m3_to_f32(0xff).is_nan());
        assert!(f8e4m3_to_f32(0x80) == 0.0 && f8e4m3_to_f32(0x80).is_sign_negative());
    }
}
