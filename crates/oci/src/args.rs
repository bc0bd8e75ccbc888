//! The command line, as runc 1.5 has it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::Error;

/// OCI runtime: creates and runs containers from bundles (a directory with config.json and a root file system)
#[derive(Debug, Parser)]
#[command(name = "runc", max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// Log more
    #[arg(long)]
    pub(crate) debug: bool,
    /// File that errors are appended to [default: stderr]
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Form of the log
    #[arg(long, default_value = "text", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Where states of containers are kept; on a tmpfs
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Let systemd make control groups; cgroupsPath is then "slice:prefix:name"
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub(crate) systemd_cgroup: bool,
    /// Go on without control groups where they may not be made: true, false or auto
    #[arg(long, default_value = "auto", value_name = "WHETHER")]
    pub(crate) rootless: Rootless,
    /// Without effect, as in runc
    #[arg(long, hide = true)]
    pub(crate) criu: Option<String>,
    /// Print the version
    #[arg(long, short)]
    pub(crate) version: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Form of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Whether to do without what root alone may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rootless {
    True,
    False,
    Auto,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a container whose process waits to be started
    Create(CreateOptions),
    /// Start the process of a container that was created
    Start {
        /// The container
        id: String,
    },
    /// Create, start, and wait for the end
    Run(RunOptions),
    /// Print the state of a container
    State {
        /// The container
        id: String,
    },
    /// Send a signal to the process of a container
    Kill(KillOptions),
    /// Remove what is left of a container
    Delete(DeleteOptions),
    /// Start a further process in a container
    Exec(ExecOptions),
    /// List containers
    List(ListOptions),
    /// List the processes of a container
    Ps(PsOptions),
    /// Stop all processes of a container
    Pause {
        /// The container
        id: String,
    },
    /// Let them go on
    Resume {
        /// The container
        id: String,
    },
    /// Change limits of a container
    Update(UpdateOptions),
    /// Tell what a container uses, and when it runs out of memory
    Events(EventsOptions),
    /// Write a config.json to begin with
    Spec(SpecOptions),
    /// Tell what this runtime can do
    Features,
    /// Not possible
    #[command(hide = true)]
    Checkpoint(Anything),
    /// Not possible
    #[command(hide = true)]
    Restore(Anything),
}

/// Arguments of commands that are refused.
#[derive(Debug, Args)]
pub(crate) struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) words: Vec<String>,
}

/// Options of `create`, and of `run`, too.
#[derive(Debug, Args)]
pub(crate) struct CreateOptions {
    /// The bundle [default: the current directory]
    #[arg(long, short, value_name = "DIR", default_value = ".", hide_default_value = true)]
    pub(crate) bundle: PathBuf,
    /// Unix socket that gets the master of the terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Unix socket that gets a descriptor of the process
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// File that gets the process id
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Enter the root by chroot: for a host whose root is an initramfs
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Share the session keyring of the caller
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// Hand on so many descriptors from number 3 on
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// The container's name, not in use yet
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    #[command(flatten)]
    pub(crate) create: CreateOptions,
    /// Do not wait for the end
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Keep the container's state when its process has ended
    #[arg(long)]
    pub(crate) keep: bool,
    /// Let somebody else reap what the container orphans
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

#[derive(Debug, Args)]
pub(crate) struct KillOptions {
    /// Without a process it is no error
    #[arg(long, short, hide = true)]
    pub(crate) all: bool,
    /// The container
    pub(crate) id: String,
    /// The signal, by name or number
    #[arg(default_value = "SIGTERM")]
    pub(crate) signal: String,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteOptions {
    /// End it first if it runs; no error if it does not exist
    #[arg(long, short)]
    pub(crate) force: bool,
    /// The container
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct ExecOptions {
    /// Unix socket that gets the master of the terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Unix socket that gets a descriptor of the process
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// Further environment; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Give it a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// User, and group
    #[arg(long, short, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// Supplementary groups; may be repeated
    #[arg(long, short = 'g', value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// The process as JSON, as in a config.json, in the place of a command
    #[arg(long, short, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Do not wait for the end
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// File that gets the process id
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// SELinux context
    #[arg(long, value_name = "LABEL")]
    pub(crate) process_label: Option<String>,
    /// AppArmor profile
    #[arg(long, value_name = "PROFILE")]
    pub(crate) apparmor: Option<String>,
    /// exec never adds privileges
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// Further capability; may be repeated
    #[arg(long, short, value_name = "NAME")]
    pub(crate) cap: Vec<String>,
    /// Hand on so many descriptors from number 3 on
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// Group below the container's to begin in
    #[arg(long, value_name = "[CONTROLLER:]PATH")]
    pub(crate) cgroup: Vec<String>,
    /// Also in a container that is paused: it begins when that goes on
    #[arg(long)]
    pub(crate) ignore_paused: bool,
    /// The container
    pub(crate) id: String,
    /// The command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// Form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct ListOptions {
    /// Form of the list
    #[arg(long, short, default_value = "table")]
    pub(crate) format: Format,
    /// Names alone
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PsOptions {
    /// Form of the list
    #[arg(long, short, default_value = "table")]
    pub(crate) format: Format,
    /// The container
    pub(crate) id: String,
    /// Options of ps(1)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) ps: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EventsOptions {
    /// How often
    #[arg(long, default_value = "5s", value_name = "TIME")]
    pub(crate) interval: String,
    /// Once, and end
    #[arg(long)]
    pub(crate) stats: bool,
    /// The container
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct SpecOptions {
    /// The bundle [default: the current directory]
    #[arg(long, short, value_name = "DIR")]
    pub(crate) bundle: Option<PathBuf>,
    /// For a user who is not root
    #[arg(long)]
    pub(crate) rootless: bool,
}

#[derive(Debug, Default, Args)]
pub(crate) struct UpdateOptions {
    /// Limits as JSON, as in a config.json; - is standard input
    #[arg(long, short, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// Weight of input and output, 10 to 1000
    #[arg(long)]
    pub(crate) blkio_weight: Option<u16>,
    /// Length of a period in microseconds
    #[arg(long)]
    pub(crate) cpu_period: Option<u64>,
    /// CPU time in each period in microseconds
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// CPU time that may be saved up in microseconds
    #[arg(long)]
    pub(crate) cpu_burst: Option<u64>,
    /// CPU time in relation to others
    #[arg(long)]
    pub(crate) cpu_share: Option<u64>,
    /// Length of a real-time period in microseconds
    #[arg(long)]
    pub(crate) cpu_rt_period: Option<u64>,
    /// Real-time CPU time in each period in microseconds
    #[arg(long)]
    pub(crate) cpu_rt_runtime: Option<i64>,
    /// CPUs
    #[arg(long)]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes
    #[arg(long)]
    pub(crate) cpuset_mems: Option<String>,
    /// 1 runs only when nobody else wants to
    #[arg(long)]
    pub(crate) cpu_idle: Option<i64>,
    /// Memory in bytes
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory: Option<String>,
    /// Memory that is left under pressure, in bytes
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory_reservation: Option<String>,
    /// Memory and swap together in bytes; -1 is unlimited
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<String>,
    /// Without effect: the kernel has no such limit any more
    #[arg(long, hide = true)]
    pub(crate) kernel_memory: Option<String>,
    /// Without effect: the kernel has no such limit any more
    #[arg(long, hide = true)]
    pub(crate) kernel_memory_tcp: Option<String>,
    /// Processes; -1 is unlimited
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Class of service of Intel's RDT
    #[arg(long, hide = true)]
    pub(crate) l3_cache_schema: Option<String>,
    /// Memory bandwidth of Intel's RDT
    #[arg(long, hide = true)]
    pub(crate) mem_bw_schema: Option<String>,
    /// The container
    pub(crate) id: String,
}

/// `--version`, in the lines that Docker Engine looks for.
pub(crate) fn print_version() -> Result<ExitCode, Error> {
    crate::inspect::print(&format!("runc version {}\nspec: {}\n", env!("CARGO_PKG_VERSION"), executor::oci::VERSION))?;
    Ok(ExitCode::SUCCESS)
}
