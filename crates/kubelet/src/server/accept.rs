//! Taking connections in, also while none can be had.

use std::io;
use std::time::Duration;

/// After a connection could not be taken, as there was no descriptor left: the next try would fail at once, too.
const BREATH: Duration = Duration::from_millis(100);

/// The next connection that `accept` gives. What keeps it from giving one is logged, and it is tried again.
pub async fn next<T, A>(mut accept: impl FnMut() -> A) -> T
where
    A: Future<Output = io::Result<T>>,
{
    loop {
        match accept().await {
            Ok(accepted) => return accepted,
            Err(error) => tracing::warn!(%error, "a client cannot be accepted"),
        }
        tokio::time::sleep(BREATH).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_takes_a_breath_when_no_descriptor_is_left() {
        let tried = Cell::new(0);
        let accept = || {
            tried.set(tried.get() + 1);
            let spent = io::Error::from(sys::rustix::io::Errno::MFILE);
            std::future::ready(if tried.get() < 4 { Err(spent) } else { Ok(()) })
        };
        let begun = tokio::time::Instant::now();
        next(accept).await;
        assert_eq!((tried.get(), begun.elapsed()), (4, BREATH * 3));
    }
}
