//! What daemons count of themselves, and Prometheus' text form of it. Counting is an addition; text is only made when
//! somebody asks.

mod counting;
pub mod process;
mod text;

pub use counting::{Counts, Histogram, Histograms};
pub use text::{Text, labels};
