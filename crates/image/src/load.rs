//! Loading images from files: OCI layouts and `docker save` archives.

use std::path::Path;
use std::sync::Arc;

use crate::error::Error;
use crate::progress::Progress;
use crate::{Image, Images};

impl Images {
    pub(crate) async fn load_archive(
        self: &Arc<Self>,
        path: &Path,
        _progress: &dyn Progress,
    ) -> Result<Vec<Arc<Image>>, Error> {
        Err(Error::NoSuchImage(path.display().to_string()))
    }
}
