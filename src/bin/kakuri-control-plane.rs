//! The control plane; see `kakuri::control_plane`.
fn main() -> std::process::ExitCode {
    kakuri::control_plane::main()
}
