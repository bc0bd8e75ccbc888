//! What another runtime leaves to its kubelet: logs that grow, images that nobody uses. orlop's own looks after both itself.

mod images;
mod logs;

use std::sync::Arc;

use cri::{ImageService, RuntimeService};

use crate::configuration::{ImageGc, LogLimits};

pub use images::{Freed, ImageTrouble, Images, Shortage};

/// What is kept within which limits.
pub struct Upkeep {
    /// Whose containers write logs.
    pub runtime: Arc<dyn RuntimeService>,
    /// Whose images fill the disk.
    pub images: Arc<dyn ImageService>,
    /// When a log is rotated.
    pub log_limits: LogLimits,
    /// When images go.
    pub image_gc: ImageGc,
    /// Who tells when they do not.
    pub shortage: Shortage,
}

impl Upkeep {
    /// Looks from now on. Never returns.
    pub async fn run(self) {
        let images = Images::new(self.runtime.clone(), self.images.clone());
        tokio::join!(logs::keep(self.runtime, self.log_limits), images.keep(self.image_gc, self.shortage));
    }
}
