//! Entry.
mod config;
fn main() {
    let arg = std::env::args().nth(1);
    if arg.as_deref() == Some("ref") {
        print!("{}", config::reference::page());
        return;
    }
    if arg.as_deref() == Some("ex") {
        print!("{}", config::reference::example());
        return;
    }
    let flags = config::Flags::default();
    let loaded = config::load(&flags, &config::Environment::of_process());
    match loaded {
        Ok(l) => {
            println!("{}", config::show::toml(&l));
            println!("{}", config::reference::page());
            println!("{}", config::reference::example());
        }
        Err(e) => {
            for v in &e.violations {
                println!("{v}")
            }
        }
    }
}
