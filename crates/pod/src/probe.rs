//! The state of a container's probes: when the next one is due, and what its results mean.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Probe};
use serde::{Deserialize, Serialize};

/// Which probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// Holds the other two back until it has succeeded once.
    Startup,
    /// A container that fails it is restarted.
    Liveness,
    /// A container that fails it gets no requests.
    Readiness,
}

impl Kind {
    /// As events spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    /// The probe of this kind in a container's spec.
    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// All kinds, in the order in which they are looked at.
pub const KINDS: [Kind; 3] = [Kind::Startup, Kind::Liveness, Kind::Readiness];

/// What one run of a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It succeeded.
    Success,
    /// It failed, or was not answered in time.
    Failure,
}

/// What one run of a probe was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// When it began to ask: turns are a period apart, however long an answer takes.
    pub asked: Timestamp,
    /// What that means; none if nobody could be asked, which tells nothing of the container.
    pub outcome: Option<Outcome>,
    /// Why it failed, or what is odd about its success.
    pub message: String,
    /// Nobody listens at its port: the container has not seen that it was asked.
    pub refused: bool,
}

/// The shortest pause before it is looked again whether somebody listens.
const LOOK_MIN: SignedDuration = SignedDuration::from_millis(20);

/// When it is worth while to ask out of turn a container that has been running since `started` and was `refused` then: a
/// quarter of that time later, so that it is told to be ready soon after it is, whatever the period of its probe. Asking costs
/// the container nothing as long as nobody listens, and a failure out of turn does not count.
pub(crate) fn look(refused: Timestamp, started: Timestamp) -> Option<Timestamp> {
    let waited = refused.duration_since(started);
    (waited >= SignedDuration::ZERO).then(|| refused.saturating_add((waited / 4).max(LOOK_MIN)).ok()).flatten()
}

/// One probe of one run of a container. Kept over restarts of the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// When it ran last, from its begin.
    pub last: Option<Timestamp>,
    /// The newest outcome and how often it came in a row.
    pub streak: Option<(Outcome, i32)>,
    /// What holds after the thresholds; `None` before the first threshold was reached.
    pub verdict: Option<Outcome>,
}

impl State {
    /// Takes in the outcome of a run that began at `asked`.
    #[must_use]
    pub fn after(self, probe: &Probe, outcome: Outcome, asked: Timestamp) -> Self {
        let count = match self.streak {
            Some((last, count)) if last == outcome => count.saturating_add(1),
            _ => 1,
        };
        let threshold = match outcome {
            Outcome::Success => probe.success_threshold.unwrap_or(1),
            Outcome::Failure => probe.failure_threshold.unwrap_or(3),
        };
        let verdict = if count >= threshold.max(1) { Some(outcome) } else { self.verdict };
        Self { last: Some(asked), streak: Some((outcome, count)), verdict }
    }

    /// Nobody could be asked at `asked`: that was a turn, and tells nothing.
    #[must_use]
    pub fn unasked(self, asked: Timestamp) -> Self {
        Self { last: Some(asked), ..self }
    }

    /// When it has to run next, for a container that has been running since `started`. Where a clock that jumped back
    /// would make the wait longer than it was meant to be, it is due now.
    pub fn due(&self, probe: &Probe, started: Timestamp, now: Timestamp) -> Timestamp {
        let seconds = |value: Option<i32>, default: i32| SignedDuration::from_secs(value.unwrap_or(default).into());
        let after = |time: Timestamp, wait: SignedDuration| {
            if time > now { now } else { time.saturating_add(wait).unwrap_or(now) }
        };
        let first = after(started, seconds(probe.initial_delay_seconds, 0));
        match self.last {
            None => first,
            Some(last) => {
                let period = seconds(probe.period_seconds, 10).max(SignedDuration::from_secs(1));
                after(last, period).max(first)
            }
        }
    }
}

/// The three probes of one run of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct States {
    /// The startup probe.
    pub startup: State,
    /// The liveness probe.
    pub liveness: State,
    /// The readiness probe.
    pub readiness: State,
}

impl States {
    /// The state of one kind.
    pub fn get(&self, kind: Kind) -> &State {
        match kind {
            Kind::Startup => &self.startup,
            Kind::Liveness => &self.liveness,
            Kind::Readiness => &self.readiness,
        }
    }

    /// The state of one kind, to change it.
    pub fn get_mut(&mut self, kind: Kind) -> &mut State {
        match kind {
            Kind::Startup => &mut self.startup,
            Kind::Liveness => &mut self.liveness,
            Kind::Readiness => &mut self.readiness,
        }
    }

    /// Whether a running container has started: it has no startup probe, or that has succeeded.
    pub fn started(&self, container: &Container) -> bool {
        container.startup_probe.is_none() || self.startup.verdict == Some(Outcome::Success)
    }

    /// Whether a running container is ready for requests.
    pub fn ready(&self, container: &Container) -> bool {
        let answers = container.readiness_probe.is_none() || self.readiness.verdict == Some(Outcome::Success);
        self.started(container) && answers
    }

    /// The probe for which the container has to be killed now.
    pub fn fatal(&self, container: &Container) -> Option<Kind> {
        let failed = |kind: Kind| kind.of(container).is_some() && self.get(kind).verdict == Some(Outcome::Failure);
        if !self.started(container) {
            return failed(Kind::Startup).then_some(Kind::Startup);
        }
        failed(Kind::Liveness).then_some(Kind::Liveness)
    }

    /// The probes that may run now: the startup probe alone until it has succeeded, then never again.
    pub fn active(&self, container: &Container) -> impl Iterator<Item = Kind> {
        let started = self.started(container);
        let has: [bool; 3] = KINDS.map(|kind| kind.of(container).is_some());
        let wanted = move |kind: &Kind| (*kind == Kind::Startup) != started;
        KINDS.into_iter().zip(has).filter(|(_, has)| *has).map(|(kind, _)| kind).filter(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn probe(delay: i32, period: i32, failures: i32) -> Probe {
        Probe {
            initial_delay_seconds: Some(delay),
            period_seconds: Some(period),
            failure_threshold: Some(failures),
            ..Probe::default()
        }
    }

    #[test]
    fn thresholds_count_in_a_row() {
        let probe = probe(0, 10, 2);
        let mut state = State::default();
        let mut verdicts = Vec::new();
        for (second, outcome) in
            [Outcome::Success, Outcome::Failure, Outcome::Success, Outcome::Failure, Outcome::Failure]
                .into_iter()
                .enumerate()
        {
            state = state.after(&probe, outcome, at(second.try_into().unwrap()));
            verdicts.push(state.verdict.unwrap());
        }
        use Outcome::{Failure, Success};
        assert_eq!(verdicts, [Success, Success, Success, Success, Failure]);
    }

    #[test]
    fn the_first_run_waits_for_the_initial_delay() {
        let probe = probe(5, 15, 3);
        assert_eq!(State::default().due(&probe, at(100), at(100)), at(105));
        let ran = State::default().after(&probe, Outcome::Success, at(106));
        assert_eq!(ran.due(&probe, at(100), at(112)), at(121));
        assert_eq!(ran.due(&probe, at(100), at(50)), at(50), "a clock that jumped back");
    }

    #[test]
    fn looks_out_of_turn_become_rare() {
        let look = |refused: i64| {
            let refused = Timestamp::from_millisecond(refused).unwrap();
            look(refused, at(100)).map(|look| look.duration_since(refused).as_millis())
        };
        assert_eq!([100_000, 100_200, 102_000, 160_000].map(look), [20, 50, 500, 15_000].map(Some));
        assert_eq!(look(99_000), None, "of an earlier run");
    }

    #[test]
    fn startup_holds_the_others_back() {
        let container = Container {
            startup_probe: Some(probe(0, 10, 30)),
            liveness_probe: Some(probe(5, 15, 3)),
            readiness_probe: Some(probe(0, 2, 1)),
            ..Container::default()
        };
        let mut states = States::default();
        assert_eq!(states.active(&container).collect::<Vec<_>>(), [Kind::Startup]);
        assert!(!states.ready(&container));
        states.startup = states.startup.after(&probe(0, 10, 30), Outcome::Success, at(1));
        assert_eq!(states.active(&container).collect::<Vec<_>>(), [Kind::Liveness, Kind::Readiness]);
        assert!(states.started(&container) && !states.ready(&container));
    }
}
