//! Compiles our slice of CRI v1 without a protoc: protox parses, prost-build writes Rust into OUT_DIR.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const PROTO: &str = "runtime/v1/api.proto";
    println!("cargo::rerun-if-changed=proto/{PROTO}");
    let files = protox::compile([PROTO], ["proto"])?;
    prost_build::Config::new().btree_map(["."]).compile_fds(files)?;
    Ok(())
}
