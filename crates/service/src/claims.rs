//! Who has which frontend when several Services want one: the oldest, wherever the news came from first.

use std::collections::{BTreeSet, HashMap};

use crate::{Frontend, Name};

/// A Service that wants a frontend. The least one gets it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    pub(crate) created_s: i64,
    pub(crate) name: Name,
}

/// All claims.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// In order; nearly always one.
    claimants: HashMap<Frontend, Vec<Claimant>>,
    contested: BTreeSet<Frontend>,
}

/// What a withdrawn claim means for its frontend.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Released {
    /// It was another's anyway.
    Nothing,
    /// It is free, or the next one's.
    Frontend(Option<Name>),
}

impl Claims {
    /// Adds a claim that is not there yet; returns who loses the frontend by it.
    pub(crate) fn claim(&mut self, frontend: Frontend, claimant: &Claimant) -> Option<Name> {
        let claimants = self.claimants.entry(frontend).or_insert_with(|| Vec::with_capacity(1));
        let at = claimants.partition_point(|other| other < claimant);
        claimants.insert(at, claimant.clone());
        if claimants.len() > 1 {
            self.contested.insert(frontend);
        }
        claimants.get(1).filter(|_| at == 0).map(|loser| loser.name.clone())
    }

    /// Withdraws a claim.
    pub(crate) fn release(&mut self, frontend: Frontend, claimant: &Claimant) -> Released {
        let Some(claimants) = self.claimants.get_mut(&frontend) else { return Released::Nothing };
        let Ok(at) = claimants.binary_search(claimant) else { return Released::Nothing };
        claimants.remove(at);
        if claimants.len() < 2 {
            self.contested.remove(&frontend);
        }
        let next = claimants.first().map(|next| next.name.clone());
        if next.is_none() {
            self.claimants.remove(&frontend);
        }
        if at == 0 { Released::Frontend(next) } else { Released::Nothing }
    }

    /// Who has a frontend.
    pub(crate) fn owner(&self, frontend: &Frontend) -> Option<&Name> {
        self.claimants.get(frontend)?.first().map(|owner| &owner.name)
    }

    /// Who wants what another has: frontend, owner, loser.
    pub(crate) fn losers(&self) -> impl Iterator<Item = (Frontend, &Name, &Name)> {
        self.contested.iter().flat_map(|frontend| {
            let claimants = self.claimants.get(frontend).map_or(&[][..], Vec::as_slice);
            let owner = claimants.first();
            let losers = claimants.iter().skip(1);
            losers.filter_map(move |loser| Some((*frontend, &owner?.name, &loser.name)))
        })
    }
}
