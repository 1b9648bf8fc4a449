//! A run that crashes its owners: owns which one does so in a world, and when. It crashes each owner, also after the storm.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

/// What a panic of a crasher's driver says: the only panic that breaks no promise.
pub(crate) const ON_PURPOSE: &str = "a run that crashes its owners, says the simulation";
/// Makes the crasher's draws different from the world's, which are as they are without it.
const OWN_DRAWS: u64 = 0x5EED_0308;

/// When a crasher strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Its driver panics when it makes a call.
    Panics,
    /// The process dies when it makes a call.
    Calls,
    /// The process dies after a step of the run is stored and before the answer arrives: so it dies before the run's
    /// prompts are rendered.
    Starts,
    /// The process dies when it loads the run. Then the run cannot even be ended in the usual way.
    Loads,
}

/// The runs of one tag crash their owners.
#[derive(Debug, Clone)]
pub(crate) struct Crasher {
    pub(crate) tag: String,
    pub(crate) moment: Moment,
    /// Whether the provider charges for a call that is the last of its process.
    pub(crate) charged: bool,
    /// `engine.run_crashes_max` of this world.
    pub(crate) crashes_max: u32,
}

impl Crasher {
    /// A third of the seeds have one.
    pub(crate) fn of_seed(seed: u64) -> Option<Self> {
        let rng = &mut StdRng::seed_from_u64(seed ^ OWN_DRAWS);
        if !rng.random_ratio(1, 3) {
            return None;
        }
        let moments = [Moment::Panics, Moment::Calls, Moment::Starts, Moment::Loads];
        Some(Self {
            tag: format!("t{}", rng.random_range(0..3)),
            moment: moments.choose(rng).copied().unwrap_or(Moment::Calls),
            charged: rng.random(),
            crashes_max: [3, 5].choose(rng).copied().unwrap_or(5),
        })
    }
}
