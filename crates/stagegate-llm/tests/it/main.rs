//! The model layer against real sockets.

mod providers;
