//! The simulator's chance: owns a stream of numbers that depends on nothing but what it is made from. (A library's
//! generator may change its stream with its version; an extended hash does not.)

/// Dice for one purpose and one question.
#[derive(Debug)]
pub(super) struct Dice(blake3::OutputReader);

impl Dice {
    pub(super) fn new(seed: u64, purpose: &str, question: [u8; 32], nth: u32) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"stagegate sim 1");
        hasher.update(&seed.to_le_bytes()).update(&question).update(&nth.to_le_bytes()).update(purpose.as_bytes());
        Self(hasher.finalize_xof())
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// In [0, 1).
    #[expect(clippy::cast_precision_loss, reason = "53 bits are what a float holds")]
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// In 0..n; 0 where n is 0. The bias of the remainder is far below what anybody could see.
    pub(super) fn below(&mut self, n: u32) -> u32 {
        u32::try_from(self.next() % u64::from(n.max(1))).unwrap_or(0)
    }

    /// In 0..n.
    pub(super) fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(u32::try_from(n).unwrap_or(u32::MAX))).unwrap_or(0)
    }

    /// One of a list that is not empty.
    pub(super) fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.index(list.len())]
    }

    /// A standard normal number, by Box and Muller.
    pub(super) fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}
