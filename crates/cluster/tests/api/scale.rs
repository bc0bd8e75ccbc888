use testkit::serial::Test;
pub(crate) const TESTS: &[Test] = &[];
