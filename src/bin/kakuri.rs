//! The command line; see `kakuri::cli`.
fn main() -> std::process::ExitCode {
    kakuri::cli::main()
}
