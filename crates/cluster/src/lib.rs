//! Where the desired state comes from: one `Source` trait, one store, and the manifests directory.
