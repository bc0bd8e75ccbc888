//! What a pod needs next: spec, observed state and time become a plan. Pure.
