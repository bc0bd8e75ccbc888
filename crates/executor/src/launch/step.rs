//! The steps of a launch.

use std::fmt;

/// Declares the steps once: name, number on the channel, words for an operator.
macro_rules! steps {
    ($($(#[$meta:meta])* $name:ident = $number:literal, $words:literal;)*) => {
        /// Steps of a launch, in about the order in which they are made.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u16)]
        #[allow(missing_docs, reason = "`Display` says what each one is")]
        pub enum Step { $($name = $number),* }

        impl Step {
            pub(crate) fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }

        impl fmt::Display for Step {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$name => $words),* })
            }
        }
    };
}

steps! {
    Protocol = 0, "the new process ended without a word";
    Descriptors = 1, "the descriptors of the launch";
    Clone = 2, "making the process";
    JoinCgroup = 3, "entering the control group";
    Rlimit = 4, "setting a resource limit";
    OomScore = 5, "setting oom_score_adj";
    JoinNamespace = 6, "joining a namespace";
    NewNamespace = 7, "making a namespace";
    Session = 8, "making a session";
    Hostname = 9, "setting the host name";
    Filesystem = 10, "making a file system";
    Root = 11, "entering the root file system";
    Mount = 12, "mounting";
    Device = 13, "making a device";
    Terminal = 14, "opening the terminal";
    Sysctl = 15, "setting a sysctl";
    ReadonlyPath = 16, "making a path read-only";
    MaskedPath = 17, "masking a path";
    RootAttributes = 18, "setting the attributes of the root";
    WorkingDirectory = 19, "entering the working directory";
    Streams = 20, "connecting the standard streams";
    Capabilities = 21, "setting capabilities";
    User = 22, "becoming the user";
    NoNewPrivileges = 23, "setting no_new_privs";
    Seccomp = 24, "installing the seccomp filter";
    ParentDeath = 25, "binding its life to its keeper";
    Execute = 26, "executing";
    Waiting = 27, "waiting for the new process";
    Hook = 28, "running a hook";
    Time = 29, "setting the clocks of the time namespace";
    Scheduling = 30, "setting how it is scheduled";
    Label = 31, "setting the security label";
    Keyring = 32, "making a session keyring";
    Runtime = 33, "the OCI runtime";
}
