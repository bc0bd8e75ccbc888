//! Random bytes from the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// `N` random bytes. Waits for the kernel's generator to be seeded, which it is by the time anything but init runs.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        // EINTR while waiting for the seed is the only error getrandom(2) knows for such arguments; then it is asked again.
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty()).unwrap_or(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_draws_differ() {
        assert_ne!(super::bytes::<16>(), super::bytes::<16>());
    }
}
