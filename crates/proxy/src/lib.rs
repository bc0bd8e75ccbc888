//! Carries `Rules` to a kernel backend: pacing, connection tracking, health-check node ports.
