//! Requests that wait for their client: each is named by a random token that opens it once, for a minute.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cri::{Error, v1};
use tokio::time::Instant;

/// How long a token opens its request, as in upstream's `k8s.io/cri-streaming`.
pub(crate) const LIFETIME: Duration = Duration::from_secs(60);

/// Most requests that wait at once; upstream's number.
const WAITING_MAX: usize = 1000;

/// A request that has been answered with a URL.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Pending {
    Exec(v1::ExecRequest),
    Attach(v1::AttachRequest),
    PortForward(v1::PortForwardRequest),
}

impl Pending {
    /// What stands for it in the URL.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward(_) => "portforward",
        }
    }

    /// The container or sandbox that it is for.
    pub(crate) fn owner(&self) -> &str {
        match self {
            Self::Exec(request) => &request.container_id,
            Self::Attach(request) => &request.container_id,
            Self::PortForward(request) => &request.pod_sandbox_id,
        }
    }
}

/// The requests that wait, oldest first. Few enough to be searched one by one.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    waiting: Mutex<VecDeque<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    token: String,
    deadline: Instant,
    request: Pending,
}

impl Tokens {
    /// Keeps `request` and answers its token.
    ///
    /// # Errors
    /// Too many requests wait.
    pub(crate) fn insert(&self, request: Pending) -> Result<String, Error> {
        let mut waiting = self.current();
        if waiting.len() >= WAITING_MAX {
            let message = format!("{WAITING_MAX} exec, attach or port-forward requests wait for their clients already");
            return Err(Error::ResourceExhausted(message));
        }
        let token = random_token();
        waiting.push_back(Waiting { token: token.clone(), deadline: Instant::now() + LIFETIME, request });
        Ok(token)
    }

    /// The request of `token`, which is spent by this.
    pub(crate) fn take(&self, token: &str) -> Option<Pending> {
        let mut waiting = self.current();
        let place = waiting.iter().position(|waiting| waiting.token == token)?;
        waiting.remove(place).map(|waiting| waiting.request)
    }

    /// The requests whose time is not over.
    fn current(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        while waiting.front().is_some_and(|oldest| oldest.deadline <= now) {
            waiting.pop_front();
        }
        waiting
    }
}

/// 128 random bits: whoever can reach the listener must not be able to guess.
fn random_token() -> String {
    sys::random::bytes::<16>().iter().fold(String::with_capacity(32), |mut token, byte| {
        // Writing to a string cannot fail.
        let _ = write!(token, "{byte:02x}");
        token
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: &str) -> Pending {
        Pending::PortForward(v1::PortForwardRequest { pod_sandbox_id: id.to_owned(), port: vec![80] })
    }

    #[tokio::test]
    async fn a_token_opens_its_request_once() {
        let tokens = Tokens::default();
        let (first, second) = (tokens.insert(request("a")).unwrap(), tokens.insert(request("b")).unwrap());
        assert_eq!(tokens.take(&second), Some(request("b")));
        assert_eq!(tokens.take(&first), Some(request("a")));
        assert_eq!((tokens.take(&first), tokens.take("")), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_expires() {
        let tokens = Tokens::default();
        let old = tokens.insert(request("old")).unwrap();
        tokio::time::advance(LIFETIME / 2).await;
        let young = tokens.insert(request("young")).unwrap();
        tokio::time::advance(LIFETIME / 2).await;
        assert_eq!((tokens.take(&old), tokens.take(&young)), (None, Some(request("young"))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_tokens_is_bounded() {
        let tokens = Tokens::default();
        let first = tokens.insert(request("x")).unwrap();
        for _ in 1..WAITING_MAX {
            tokens.insert(request("x")).unwrap();
        }
        assert!(matches!(tokens.insert(request("x")), Err(Error::ResourceExhausted(_))));
        tokens.take(&first).unwrap();
        tokens.insert(request("x")).unwrap();
        tokio::time::advance(LIFETIME).await;
        tokens.insert(request("x")).unwrap();
    }
}
