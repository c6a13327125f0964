//! The CRI simulator; see `kakuri::sim`.
fn main() -> std::process::ExitCode {
    kakuri::sim::main()
}
