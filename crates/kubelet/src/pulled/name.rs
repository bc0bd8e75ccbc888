//! Names of images, as pods write them.

/// The name without tag and digest: what credentials are for.
pub(super) fn without_tag(image: &str) -> &str {
    let named = image.split_once('@').map_or(image, |(named, _)| named);
    match named.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => named,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_no_tag() {
        let name = "r.io:5000/team/app";
        for image in [name, "r.io:5000/team/app:1", "r.io:5000/team/app@sha256:00", "r.io:5000/team/app:1@sha256:00"] {
            assert_eq!(without_tag(image), name);
        }
        assert_eq!(without_tag("busybox:1"), "busybox");
    }
}
