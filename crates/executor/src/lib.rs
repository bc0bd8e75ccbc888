//! OCI runtime spec to `LaunchPlan` (pure), `LaunchPlan` to process (does).
