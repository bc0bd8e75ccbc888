//! A container, or a process in one, that another OCI runtime makes: its commands one after the other, and what they leave.
//!
//! ```text
//! create ─► its process is orphaned and becomes the keeper's child ─► start ─► the program runs
//!    ├─ file `pid`: which process that is
//!    └─ socket `console.sock`: the master of its terminal
//! ```
//! The container's files are mounted in a mount namespace of the first command alone: nothing is mounted on the host, and
//! the runtime finds detached mounts and the pod's namespaces by paths of its directory, as its bundle names them.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use executor::oci::NamespaceKind;
use executor::{LaunchError, Launched, Outcome, Step};
use sys::cgroup::Entry;
use sys::mount::{self, Change, Propagation};
use sys::path::Kind;
use sys::process::{self, Child, Clone, Exit, namespace};
use sys::rustix::io::Errno;
use sys::rustix::process::{Pid, chdir};
use sys::{fork, path};

use crate::protocol::{CONSOLE, Commands, MOUNTS, PID, ROOTFS};

/// Where a runtime finds the programs of the host that it starts itself, such as hooks by name.
const PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most that is read of a file or a message which a runtime has written (R6).
const WORDS_MAX: usize = 4096;

/// What the first command finds in its directory.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// Becomes `rootfs`.
    pub(crate) root: Option<OwnedFd>,
    /// Become `mounts/0` and so on.
    pub(crate) mounts: Vec<OwnedFd>,
    /// Where it begins.
    pub(crate) cgroup: Option<Entry>,
    /// Become `mounts/net` and so on.
    pub(crate) namespaces: Vec<(NamespaceKind, OwnedFd)>,
    /// Directories of the root that become `mounts/v0` and so on: they can be mounted where the root is read-only.
    pub(crate) volumes: Vec<String>,
}

/// A runtime's commands on their way.
#[derive(Debug)]
pub(crate) struct Driven {
    program: CString,
    directory: PathBuf,
    /// Those that come after the current one.
    commands: VecDeque<Vec<CString>>,
    console: Option<UnixListener>,
    current: Child,
    is_reaped: bool,
    /// Why the current one could not even be executed.
    words: File,
    made: Option<Child>,
    terminal: Option<OwnedFd>,
    failure: Option<LaunchError>,
}

/// What there was to hear.
#[derive(Debug)]
pub(crate) enum Heard {
    /// The current command goes on.
    Nothing,
    /// The next command has begun; the descriptor of this one is not to be watched any more.
    Next(Child),
    /// It is known what became of it.
    End,
}

impl AsFd for Driven {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.current.pidfd.as_fd()
    }
}

impl Driven {
    /// Begins the first command. Its streams become those of the process that it makes; with a terminal it has none.
    pub(crate) fn start(
        commands: &Commands,
        terminal: bool,
        streams: [Option<OwnedFd>; 3],
        tree: &Tree,
    ) -> Result<Self, LaunchError> {
        let program = word(&commands.program)?;
        let all: Result<VecDeque<Vec<CString>>, LaunchError> =
            commands.words.iter().map(|words| words.iter().map(|text| word(text)).collect()).collect();
        let mut commands_left = all?;
        let first = commands_left.pop_front().ok_or_else(|| failed(Errno::INVAL, "no command"))?;
        let directory = PathBuf::from(&commands.directory);
        let console = terminal.then(|| listen(&directory)).transpose()?;
        let call =
            Call { program: &program, words: &first, directory: &directory, streams: &streams, tree: Some(tree) };
        let (current, words) = call.make()?;
        Ok(Self {
            program,
            directory,
            commands: commands_left,
            console,
            current,
            is_reaped: false,
            words,
            made: None,
            terminal: None,
            failure: None,
        })
    }

    /// Takes note of what has happened. Does not wait.
    pub(crate) fn hear(&mut self) -> Heard {
        match process::try_reap(self.current.pidfd.as_fd()) {
            Ok(None) => return Heard::Nothing,
            Ok(Some(exit)) => {
                self.is_reaped = true;
                match self.ended(exit) {
                    Ok(Some(before)) => return Heard::Next(before),
                    Ok(None) => {}
                    Err(error) => self.failure = Some(error),
                }
            }
            Err(error) => self.failure = Some(failed(error.errno, error.call)),
        }
        Heard::End
    }

    /// A command has ended; its descriptor when there is a next one.
    fn ended(&mut self, exit: Exit) -> Result<Option<Child>, LaunchError> {
        if exit != Exit::Code(0) {
            return Err(LaunchError { step: Step::Runtime, errno: 0, detail: self.why(exit) });
        }
        if self.made.is_none() {
            self.made = Some(self.find()?);
            self.terminal = self.console.take().map(take_terminal).transpose()?;
        }
        let Some(next) = self.commands.pop_front() else { return Ok(None) };
        let call = Call {
            program: &self.program,
            words: &next,
            directory: &self.directory,
            streams: &[None, None, None],
            tree: None,
        };
        let (child, words) = call.make()?;
        (self.is_reaped, self.words) = (false, words);
        Ok(Some(std::mem::replace(&mut self.current, child)))
    }

    fn why(&mut self, exit: Exit) -> String {
        let mut text = String::new();
        // Nobody has the other end any more: the program was executed, or its process has ended.
        let _ = (&mut self.words).take(WORDS_MAX as u64).read_to_string(&mut text);
        match exit {
            _ if !text.is_empty() => text,
            Exit::Code(code) => format!("{} ended with exit status {code}", self.program.to_string_lossy()),
            Exit::Signal(signal) => format!("{} was ended by signal {signal}", self.program.to_string_lossy()),
        }
    }

    /// The process that was made. It has become the keeper's own by then.
    fn find(&self) -> Result<Child, LaunchError> {
        let path = self.directory.join(PID);
        let unclear = |detail: &str| failed(Errno::CHILD, format!("{}: {detail}", path.display()));
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(WORDS_MAX as u64).read_to_string(&mut text));
        read.map_err(|error| io_failed(&error, path.display().to_string()))?;
        let pid = text.trim().parse().ok().filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| unclear("no process id"))?;
        let pidfd = process::pidfd_open(pid).map_err(|error| failed(error.errno, "the process that it made"))?;
        if !process::is_child(pidfd.as_fd()) {
            return Err(unclear("the process is not an orphan of the runtime"));
        }
        Ok(Child { pid, pidfd })
    }

    /// Ends it, whatever it does.
    pub(crate) fn give_up(mut self, errno: Errno) -> Outcome {
        self.failure = Some(LaunchError {
            step: Step::Waiting,
            errno: errno.raw_os_error(),
            detail: self.program.to_string_lossy().into_owned(),
        });
        self.finish()
    }

    /// What became of it; what is of no use is ended.
    pub(crate) fn finish(self) -> Outcome {
        let Self { current, is_reaped, made, terminal, failure, .. } = self;
        match (failure, made) {
            (None, Some(child)) => {
                let launched = Launched { child, terminal, listener: None, gate: None, warnings: Vec::new() };
                Outcome { launched: Ok(launched), rest: Vec::new() }
            }
            (failure, made) => {
                let failure = failure.unwrap_or_else(|| failed(Errno::CHILD, "it has made no process"));
                let mut rest: Vec<Child> = made.into_iter().collect();
                if !is_reaped {
                    let _ = process::kill_group(current.pid); // With what it has started; it may lead no group yet.
                    rest.push(current);
                }
                for child in &rest {
                    let _ = process::send_signal(child.pidfd.as_fd(), 9); // It may have ended.
                }
                Outcome { launched: Err(failure), rest }
            }
        }
    }
}

fn failed(errno: Errno, detail: impl Into<String>) -> LaunchError {
    LaunchError { step: Step::Runtime, errno: errno.raw_os_error(), detail: detail.into() }
}

fn io_failed(error: &io::Error, detail: impl Into<String>) -> LaunchError {
    LaunchError { step: Step::Runtime, errno: error.raw_os_error().unwrap_or(0), detail: detail.into() }
}

fn word(text: &str) -> Result<CString, LaunchError> {
    CString::new(text).map_err(|_| failed(Errno::INVAL, "a word with a zero byte"))
}

/// The socket to which the runtime sends the master of the terminal. The path is a short one, below the working directory.
fn listen(directory: &Path) -> Result<UnixListener, LaunchError> {
    let path = directory.join(CONSOLE);
    let _ = fs::remove_file(&path); // Of a try before this one.
    let listener = UnixListener::bind(&path).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|error| io_failed(&error, path.display().to_string()))
}

/// What was sent is there when the command has ended.
fn take_terminal(listener: UnixListener) -> Result<OwnedFd, LaunchError> {
    let fail = |error: io::Error| io_failed(&error, "it has sent no terminal");
    let (connection, _) = listener.accept().map_err(fail)?;
    connection.set_nonblocking(true).map_err(fail)?;
    let mut descriptors = Vec::new();
    sys::fdpass::recv(connection.as_fd(), &mut [0; WORDS_MAX], &mut descriptors).map_err(fail)?;
    descriptors.into_iter().next().ok_or_else(|| failed(Errno::BADF, "it has sent no terminal"))
}

/// One command of a runtime.
struct Call<'a> {
    program: &'a CStr,
    words: &'a [CString],
    directory: &'a Path,
    streams: &'a [Option<OwnedFd>; 3],
    tree: Option<&'a Tree>,
}

impl Call<'_> {
    /// Its process, and what that says if it does not come to the program.
    fn make(&self) -> Result<(Child, File), LaunchError> {
        let (words, theirs) = io::pipe().map_err(|error| io_failed(&error, "pipe"))?;
        let tree = self.tree.iter().flat_map(|tree| tree.descriptors());
        let keep: Vec<BorrowedFd<'_>> =
            self.streams.iter().flatten().map(OwnedFd::as_fd).chain(tree).chain([theirs.as_fd()]).collect();
        let child = process::spawn(&Clone { keep: Some(&keep), ..Clone::default() }, || {
            let error = self.become_program();
            let _ = (&theirs).write_all(error.as_bytes()); // Nobody is left to tell.
            127
        })
        .map_err(|error| failed(error.errno, error.call))?;
        Ok((child, File::from(OwnedFd::from(words))))
    }

    /// Returns only with the reason why it failed.
    fn become_program(&self) -> String {
        match self.prepare() {
            Err(error) => error.to_string(),
            Ok(()) => {
                let arguments: Vec<CString> =
                    [self.program.to_owned()].into_iter().chain(self.words.iter().cloned()).collect();
                let errno = process::execute(self.program, &arguments, &[PATH.to_owned()]);
                format!("executing {}: {errno}", self.program.to_string_lossy())
            }
        }
    }

    fn prepare(&self) -> sys::Result<()> {
        use sys::error::Context as _;
        if let Some(tree) = self.tree.filter(|tree| tree.root.is_some()) {
            tree.enter_group()?;
            tree.build(self.directory)?;
        }
        chdir(self.directory).during("chdir", self.directory.display())?;
        fork::new_session().during("setsid", "")?;
        // The keeper's own protection from the OOM killer is not the container's.
        let _ = fs::write("/proc/self/oom_score_adj", "0"); // It is protected less than the daemon may, then.
        process::reset_signals()?;
        let null = File::options().read(true).write(true).open("/dev/null").during("open", "/dev/null")?;
        process::set_standard_streams(
            self.streams.each_ref().map(|stream| stream.as_ref().map_or(null.as_fd(), OwnedFd::as_fd)),
        )
    }
}

impl Tree {
    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let namespaces = self.namespaces.iter().map(|(_, namespace)| namespace);
        self.root.iter().chain(&self.mounts).chain(namespaces).chain(self.group_files()).map(OwnedFd::as_fd)
    }

    fn group_files(&self) -> &[OwnedFd] {
        match &self.cgroup {
            Some(Entry::Files(files)) => files,
            Some(Entry::Directory(_)) | None => &[],
        }
    }

    fn enter_group(&self) -> sys::Result<()> {
        use sys::error::Context as _;
        self.group_files()
            .iter()
            .try_for_each(|file| sys::rustix::io::write(file, b"0").map(drop))
            .during("write", "cgroup.procs")
    }

    /// Mounts everything below `directory`, in a new mount namespace of the calling process. Mounts that propagate do so as
    /// they are: what arrives here is a peer of the host's mount already.
    fn build(&self, directory: &Path) -> sys::Result<()> {
        process::leave(namespace::MOUNT)?;
        mount::set_propagation(Path::new("/"), Propagation::Private, true)?;
        if self.namespaces.iter().any(|(kind, _)| *kind == NamespaceKind::User) {
            open_way()?;
        }
        let scratch = mount::new_filesystem("tmpfs", &[("mode", Some("0755"))], 0)?;
        mount::attach_at(scratch.as_fd(), &directory.join(MOUNTS))?;
        for (index, source) in self.mounts.iter().enumerate() {
            place(scratch.as_fd(), index.to_string(), source.as_fd())?;
        }
        for (kind, namespace) in &self.namespaces {
            let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
            let copy = mount::copy_tree(Path::new(&path), false)?;
            place(scratch.as_fd(), executor::namespaces::file_name(*kind), copy.as_fd())?;
        }
        let Some(root) = &self.root else { return Ok(()) };
        let private = Change { propagation: Some(Propagation::Private), recursive: true, ..Change::default() };
        mount::set_attributes(root.as_fd(), &private)?;
        mount::attach_at(root.as_fd(), &directory.join(ROOTFS))?;
        for (index, volume) in self.volumes.iter().enumerate() {
            let found = path::make_in_root(root.as_fd(), Path::new(volume), Kind::Directory)?;
            let copy = mount::copy_tree_at(found.as_fd(), true)?;
            place(scratch.as_fd(), format!("v{index}"), copy.as_fd())?;
        }
        Ok(())
    }
}

/// Lets users of another namespace come to the sandbox's directory, the working directory: the first one above it that is root's
/// alone, as the run directory is, gets covered by one that is not, in which there is nothing but the sandbox's directories.
fn open_way() -> sys::Result<()> {
    use sys::error::Context as _;
    let sandbox = std::env::current_dir().during("getcwd", "")?;
    let is_closed = |path: &&Path| fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o001 == 0);
    let Some(closed) = sandbox.ancestors().filter(is_closed).last() else { return Ok(()) };
    let names = directories_of(&sandbox).during("readdir", sandbox.display())?;
    let copy = |name: String| mount::copy_tree(&sandbox.join(&name), false).map(|copy| (name, copy));
    let copies = names.into_iter().map(copy).collect::<sys::Result<Vec<_>>>()?;
    let cover = mount::new_filesystem("tmpfs", &[("mode", Some("0755"))], 0)?;
    mount::attach_at(cover.as_fd(), closed)?;
    let at = sandbox.strip_prefix(closed).unwrap_or(Path::new(""));
    copies.iter().try_for_each(|(name, copy)| place(cover.as_fd(), at.join(name), copy.as_fd()))?;
    chdir(&sandbox).during("chdir", sandbox.display())
}

fn directories_of(path: &Path) -> io::Result<Vec<String>> {
    let name = |entry: fs::DirEntry| entry.file_name().into_string().ok().filter(|_| entry.path().is_dir());
    fs::read_dir(path)?.map(|entry| entry.map(name)).filter_map(Result::transpose).collect()
}

/// Attaches a mount at a new place of its kind.
fn place(scratch: BorrowedFd<'_>, name: impl AsRef<Path>, mount: BorrowedFd<'_>) -> sys::Result<()> {
    let kind = if path::is_directory(mount)? { Kind::Directory } else { Kind::File };
    let at = path::make_in_root(scratch, name.as_ref(), kind)?;
    mount::attach(mount, at.as_fd())
}
