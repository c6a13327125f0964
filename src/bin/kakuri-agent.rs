//! The node agent; see `kakuri::agent`.
fn main() -> std::process::ExitCode {
    kakuri::agent::main()
}
