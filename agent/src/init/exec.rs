// SPDX-License-Identifier: Apache-2.0
//! The last stage: finds the program, changes to its user, executes it.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bulkhead_proto::agent::Process;

use super::config::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Failure, InitConfig, Stage};
use super::credentials::{self, Capabilities};
use super::hooks::Prepared;
use super::report::Reporter;
use super::{caps, paths, user};
use crate::sys;

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes the program. Returns only if that fails.
pub fn execute(
    process: &Process,
    config: &InitConfig,
    reporter: &Reporter,
) -> Result<Infallible, Failure> {
    let default_user = bulkhead_proto::agent::User::default();
    let identity = user::resolve(
        process.user.as_ref().unwrap_or(&default_user),
        &user::read_database("/etc/passwd"),
        &user::read_database("/etc/group"),
    )
    .map_err(|e| Failure::other(e.to_string()))?;
    let capabilities = Capabilities {
        granted: caps::parse(&process.capabilities)?,
        ambient: caps::parse(&process.ambient_capabilities)?,
    };
    let environment = environment(process, identity.home.as_deref());
    enter_directory(&process.cwd)?;
    let name = process
        .args
        .first()
        .ok_or_else(|| Failure::other("no command specified"))?;
    let program = find_program(name, search_path(&environment))?;

    let args = c_strings(process.args.iter().map(|arg| arg.as_bytes().to_vec()))?;
    let environment = c_strings(environment.into_iter())?;
    let path =
        CString::new(program.into_os_string().into_vec()).stage("encode the program's path")?;
    // Not every kernel has keyrings, and nothing depends on them.
    let _ = sys::new_session_keyring();
    credentials::become_user(&identity, capabilities)?;
    sys::reset_signals().stage("reset signals")?;
    reporter.executing(&identity).stage("report")?;
    let hooks = config.hooks.as_ref().map(Prepared::new).transpose()?;
    credentials::confine(config, process.no_new_privileges, capabilities)?;
    if let Some(hooks) = hooks {
        hooks.run()?;
    }
    match sys::execve(&path, &args, &environment) {
        Ok(never) => match never {},
        Err(error) => Err(exec_failure(name, &error)),
    }
}

fn exec_failure(name: &str, error: &io::Error) -> Failure {
    let (code, text) = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => {
            (EXIT_NOT_FOUND, "no such file or directory".to_owned())
        }
        Some(libc::EACCES | libc::EPERM) => (EXIT_NOT_EXECUTABLE, "permission denied".to_owned()),
        Some(libc::ENOEXEC) => (EXIT_NOT_EXECUTABLE, "exec format error".to_owned()),
        _ => (super::config::EXIT_OTHER, error.to_string()),
    };
    Failure::new(code, format!("exec: {name:?}: {text}: unknown"))
}

fn environment(process: &Process, home: Option<&[u8]>) -> Vec<Vec<u8>> {
    let mut variables: Vec<Vec<u8>> = process
        .env
        .iter()
        .map(|variable| variable.to_vec())
        .collect();
    if value_of(&variables, b"PATH").is_none() {
        variables.push([b"PATH=", DEFAULT_PATH].concat());
    }
    if value_of(&variables, b"HOME").is_none_or(<[u8]>::is_empty) {
        variables.retain(|variable| !variable.starts_with(b"HOME="));
        variables.push([b"HOME=", home.unwrap_or(b"/")].concat());
    }
    if process.terminal && value_of(&variables, b"TERM").is_none() {
        variables.push(b"TERM=xterm".to_vec());
    }
    variables
}

fn value_of<'a>(variables: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    variables
        .iter()
        .find_map(|variable| variable.strip_prefix(name)?.strip_prefix(b"="))
}

fn search_path(variables: &[Vec<u8>]) -> &[u8] {
    value_of(variables, b"PATH").unwrap_or(DEFAULT_PATH)
}

fn enter_directory(cwd: &str) -> Result<(), Failure> {
    let directory = working_directory(cwd)?;
    rustix::process::fchdir(directory).stage_on("change to working directory", cwd)
}

/// Opens the working directory. Creates it if the image lacks it.
pub fn working_directory(cwd: &str) -> Result<OwnedFd, Failure> {
    let path = Path::new(if cwd.is_empty() { "/" } else { cwd });
    if !path.is_absolute() {
        return Err(Failure::other(format!(
            "working directory {cwd:?} is not an absolute path"
        )));
    }
    paths::ensure_directory(path).stage_on("create working directory", cwd)
}

/// Looks up `name` like a shell. The error messages are runc's.
fn find_program(name: &str, search_path: &[u8]) -> Result<PathBuf, Failure> {
    let failure = |code, text: &str| Failure::new(code, format!("exec: {name:?}: {text}: unknown"));
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                Err(failure(EXIT_NOT_EXECUTABLE, "permission denied"))
            }
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
                Err(failure(EXIT_NOT_EXECUTABLE, "is a directory"))
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Err(failure(
                    EXIT_NOT_FOUND,
                    &format!("stat {name}: no such file or directory"),
                ))
            }
            Err(e) => Err(failure(super::config::EXIT_OTHER, &e.to_string())),
        };
    }
    if !name.is_empty() {
        for directory in search_path.split(|b| *b == b':') {
            let directory = if directory.is_empty() {
                b"."
            } else {
                directory
            };
            let candidate =
                PathBuf::from(std::ffi::OsString::from_vec(directory.to_vec())).join(name);
            if executable(&candidate).is_ok() {
                return Ok(candidate);
            }
        }
    }
    Err(failure(
        EXIT_NOT_FOUND,
        "executable file not found in $PATH",
    ))
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

fn c_strings(strings: impl Iterator<Item = Vec<u8>>) -> Result<Vec<CString>, Failure> {
    strings
        .map(CString::new)
        .collect::<Result<_, _>>()
        .stage("encode arguments and environment")
}

#[cfg(test)]
mod tests {
    use super::{environment, exec_failure, find_program, value_of};
    use bulkhead_proto::agent::Process;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, mode: u32| {
            let path = directory.path().join(name);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let tool = file("tool", 0o755);
        let data = file("data", 0o644);
        std::fs::create_dir(directory.path().join("folder")).unwrap();
        let path = format!("/nowhere:{}", directory.path().display());
        let find = |name: &str| find_program(name, path.as_bytes());

        assert_eq!(find("tool").unwrap(), tool);
        assert_eq!(find(tool.to_str().unwrap()).unwrap(), tool);
        for name in ["data", "folder", "nosuch", ""] {
            let failure = find(name).unwrap_err();
            assert_eq!(failure.exit_code, 127, "{name}");
            assert_eq!(
                failure.message,
                format!("exec: {name:?}: executable file not found in $PATH: unknown")
            );
        }
        let failure = find(data.to_str().unwrap()).unwrap_err();
        assert_eq!(failure.exit_code, 126);
        assert!(failure.message.ends_with("permission denied: unknown"));
        let failure = find("/no/such").unwrap_err();
        assert_eq!(failure.exit_code, 127);
        assert_eq!(
            failure.message,
            "exec: \"/no/such\": stat /no/such: no such file or directory: unknown"
        );
        assert_eq!(
            find(directory.path().to_str().unwrap())
                .unwrap_err()
                .exit_code,
            126
        );
    }

    #[test]
    fn a_failed_exec_has_the_exit_code_of_its_cause() {
        for (errno, code) in [
            (libc::ENOENT, 127),
            (libc::EACCES, 126),
            (libc::ENOEXEC, 126),
            (libc::ENOMEM, 128),
        ] {
            assert_eq!(
                exec_failure("x", &std::io::Error::from_raw_os_error(errno)).exit_code,
                code
            );
        }
    }

    #[test]
    fn what_every_program_expects_is_added_to_the_environment() {
        let process = |env: &[&str]| Process {
            env: env
                .iter()
                .map(|v| bytes::Bytes::copy_from_slice(v.as_bytes()))
                .collect(),
            ..Process::default()
        };
        let env = environment(&process(&[]), Some(b"/home/app"));
        assert_eq!(value_of(&env, b"HOME"), Some(&b"/home/app"[..]));
        assert!(value_of(&env, b"PATH").is_some());
        let env = environment(&process(&["HOME=/mine", "PATH=/bin"]), None);
        assert_eq!(env, [b"HOME=/mine".to_vec(), b"PATH=/bin".to_vec()]);
        let env = environment(&process(&["HOME=", "PATH=/bin"]), None);
        assert_eq!(env, [b"PATH=/bin".to_vec(), b"HOME=/".to_vec()]);
    }
}
