//! Pulls an image several times into an empty store, and tells how long each time took:
//!
//!     cargo run --release -p image --example pull -- 127.0.0.1:5000/large:1 /var/tmp/store 3
//!
//! To see where the time goes, run it under `perf record -g`, or under `time` for what the processors did.

#![allow(clippy::print_stdout, reason = "a command-line tool")]

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use image::{Config, Images, Silent};

fn main() -> anyhow::Result<()> {
    image::worker::maybe_run();
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: pull REFERENCE STATE_DIR [TIMES]";
    let reference = arguments.next().context(usage)?;
    let state_dir: PathBuf = arguments.next().context(usage)?.into();
    let times: u32 = arguments.next().map_or(Ok(1), |times| times.parse()).context(usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let images = Images::open(Config::new(state_dir))?;
        for _ in 0..times {
            let started = Instant::now();
            let image = images.pull(&reference.parse()?, None, &Silent).await?;
            let elapsed = started.elapsed().as_secs_f64();
            let megabytes = image.size_bytes / 1_000_000;
            println!("{elapsed:.2} s for {megabytes} MB on disk");
            images.settled().await;
            images.remove(&image.id.to_string()).await?;
        }
        Ok(())
    })
}
