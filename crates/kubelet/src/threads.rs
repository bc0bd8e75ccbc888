//! Threads for what may wait for ever.

/// Why something was not done on a thread.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The system makes no thread.
    #[error("no thread can be made")]
    None(#[from] std::io::Error),
    /// The thread ended before its work did.
    #[error("the thread died; see the log")]
    Died,
}

/// Runs what may wait for ever, for a file system that does not answer, on a thread of its own: it takes no place from
/// others. It goes on when nobody waits for it any more.
///
/// # Errors
/// No thread can be made, or `work` panicked.
pub(crate) async fn patient<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ThreadError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("volumes".into()).stack_size(512 << 10).spawn(move || {
        let _ = sender.send(work()); // Whoever asked may be gone.
    })?;
    receiver.await.map_err(|_| ThreadError::Died)
}
