//! Rebuilds the crate when a migration is added: `migrate!` by itself notices only those that it already read.

fn main() {
    println!("cargo:rerun-if-changed=../../migrations/sqlite");
}
