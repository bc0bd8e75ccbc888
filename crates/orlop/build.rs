//! How the program is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |part: &str| std::env::var(format!("CARGO_CFG_TARGET_{part}")).unwrap_or_default();
    // Where Rust brings its own LLD. A static program relocates itself with each start, a pod's helpers included: packed
    // relocations are 1.8 MB less to read. And functions that came out the same, of generic ones mostly, are kept once.
    if target("ARCH") == "x86_64" && target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
        // `sys::early`, where nothing may be called: checks of a debug build would be.
        if std::env::var_os("CARGO_CFG_DEBUG_ASSERTIONS").is_none() {
            println!("cargo::rustc-link-arg-bins=-Wl,-e,orlop_start");
        }
    }
}
