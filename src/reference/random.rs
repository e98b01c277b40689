//! Noise that is the same on every machine, and checksums.

/// What splitmix64 adds to its state for each number: 2^64 over the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Element `index` of the noise of `seed`: mean 0, standard deviation `scale`, about normally distributed (the sum of
/// four uniform numbers), never further from 0 than `3.46 scale`. It hangs on nothing else, so that an array can be
/// made in any order.
pub fn random(seed: u64, index: u64, scale: f32) -> f32 {
    // splitmix64 (Steele, Lea, Flood 2014).
    let mut bits = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(STEP));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    let sum: i32 = (0..4).map(|part| (bits >> (16 * part) & 0xffff) as i32).sum();
    // sqrt(3) / 65,536: the sum's standard deviation is 65,536 / sqrt(3).
    (sum - 131_070) as f32 * (scale * 2.642_899_5e-5)
}

/// The seed whose noise is that of `seed` from element `start` on: part of an array, made by itself.
///
/// ```
/// use anabranch::reference::{random, random_from};
/// assert_eq!(random(random_from(7, 100), 23, 1.0), random(7, 123, 1.0));
/// ```
pub fn random_from(seed: u64, start: u64) -> u64 {
    seed.wrapping_add(start.wrapping_mul(STEP))
}

/// The exclusive or of all words.
pub fn checksum(words: &[u32]) -> u32 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distribution() {
        let values: Vec<f64> = (0..100_000).map(|index| f64::from(random(7, index, 2.0))).collect();
        let mean = values.iter().sum::<f64>() / 1e5;
        let variance = values.iter().map(|value| value * value).sum::<f64>() / 1e5;
        // Five standard errors.
        assert!(mean.abs() < 0.032, "{mean}");
        assert!((variance - 4.0).abs() < 0.08, "{variance}");
        assert!(values.iter().all(|value| value.abs() <= 6.94));
    }

    #[test]
    fn an_element_hangs_on_seed_and_place() {
        assert_eq!(random(3, 17, 1.0), random(3, 17, 1.0));
        assert_ne!(random(3, 17, 1.0), random(4, 17, 1.0));
        assert_ne!(random(3, 17, 1.0), random(3, 18, 1.0));
        assert_eq!(random(3, 17, 0.5), random(3, 17, 1.0) / 2.0);
    }

    #[test]
    fn checksums_see_a_flipped_bit() {
        assert_eq!(checksum(&[]), 0);
        assert_eq!(checksum(&[0b1100, 0b1010]), 0b0110);
        assert_ne!(checksum(&[1, 2, 3]), checksum(&[1, 2, 7]));
    }
}
