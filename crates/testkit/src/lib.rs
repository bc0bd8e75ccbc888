//! Fixtures of the tests: network namespaces, control groups, registries, test images, the VM lab.
