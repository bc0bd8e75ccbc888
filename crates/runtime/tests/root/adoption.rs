//! A daemon that dies, and the next one.

use testkit::serial::Test;

pub(crate) const TESTS: &[Test] = &[];

/// Where this program was started as a daemon, it is one until it is killed.
pub(crate) fn maybe_be_a_daemon() {}
