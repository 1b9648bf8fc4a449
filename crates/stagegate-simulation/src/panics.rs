//! Panics: owns how one is noticed, wherever it is swallowed. The engine catches those of a driver, and tokio those of a
//! task; both would leave a world that goes on as if nothing had been.

use std::{
    cell::RefCell,
    panic::{PanicHookInfo, set_hook, take_hook},
    sync::{Arc, Once},
};

use crate::{crasher::ON_PURPOSE, world::World};

thread_local! {
    /// The world that this thread plays: all of it is played by one.
    static PLAYED: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
}

/// From now on a panic of this thread is one of this world, until what is returned is dropped.
pub(crate) fn listen(world: &Arc<World>) -> Listening {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            if panic.payload_as_str() == Some(ON_PURPOSE) {
                return;
            }
            note(panic);
            before(panic);
        }));
    });
    PLAYED.set(Some(Arc::clone(world)));
    Listening
}

/// See [`listen`].
pub(crate) struct Listening;

impl Drop for Listening {
    fn drop(&mut self) {
        PLAYED.set(None);
    }
}

/// Takes no lock of the world: whoever panics may hold it.
fn note(panic: &PanicHookInfo<'_>) {
    PLAYED.with_borrow(|world| {
        let Some(world) = world else { return };
        let what = panic.payload_as_str().unwrap_or("of no words");
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        // The first one counts; what follows may follow from it.
        _ = world.panic.set(format!("{what} ({place})"));
        world.broken.notify_one();
    });
}
