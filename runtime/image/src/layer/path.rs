// SPDX-License-Identifier: Apache-2.0
//! The paths in a layer's tar archive, which come from strangers: splits them into names, and refuses those that no
//! file of a layer can have.

/// `NAME_MAX` of EROFS and Linux.
const MAX_NAME_BYTES: usize = 255;
/// A deeper tree is useless, because its paths are longer than `PATH_MAX`.
pub const MAX_DEPTH: usize = 2048;

/// Why a path is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    #[error("a path must not contain \"..\"")]
    DotDot,
    #[error("a name is longer than {MAX_NAME_BYTES} bytes, contains a NUL byte or is missing")]
    BadName,
    #[error("more than {MAX_DEPTH} levels of directories")]
    TooDeep,
}

/// Splits a path into names. Leading, double and trailing slashes and `.` have no meaning.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    let names = names(path);
    for name in &names {
        if *name == b".." {
            return Err(PathError::DotDot);
        }
        if name.len() > MAX_NAME_BYTES || name.contains(&0) {
            return Err(PathError::BadName);
        }
    }
    if names.len() > MAX_DEPTH {
        return Err(PathError::TooDeep);
    }
    Ok(names)
}

/// Splits the target of a symbolic link into names. It may contain `..`.
pub fn target_names(target: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    let names = names(target);
    match names.iter().any(|name| name.len() > MAX_NAME_BYTES) {
        true => Err(PathError::BadName),
        false => Ok(names),
    }
}

/// A path without the slashes and the `.` at its end.
pub fn trimmed(mut path: &[u8]) -> &[u8] {
    loop {
        path = match path {
            [rest @ .., b'/'] | [rest @ .., b'/', b'.'] => rest,
            b"." => &[],
            _ => return path,
        };
    }
}

fn names(path: &[u8]) -> Vec<&[u8]> {
    let parts = path.split(|byte| *byte == b'/');
    parts
        .filter(|part| !part.is_empty() && *part != b".")
        .collect()
}

type Split<'a> = (Vec<&'a [u8]>, &'a [u8]);

/// Splits a path into parents and name. `None` for the root.
pub fn split(path: &[u8]) -> Result<Option<Split<'_>>, PathError> {
    let mut parents = components(path)?;
    let name = parents.pop();
    Ok(name.map(|name| (parents, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_paths_are_refused() {
        let long = "n".repeat(256);
        let deep = "d/".repeat(3000);
        for (path, error) in [
            ("../etc/passwd", PathError::DotDot),
            ("a/../../b", PathError::DotDot),
            ("a\0b", PathError::BadName),
            (long.as_str(), PathError::BadName),
            (deep.as_str(), PathError::TooDeep),
        ] {
            assert_eq!(components(path.as_bytes()), Err(error), "{path:.20}");
        }
    }

    #[test]
    fn slashes_and_dots_without_meaning_are_left_out() {
        let names: [&[u8]; 2] = [b"a", b"b"];
        for path in ["a/b", "/a//./b/", "./a/b/."] {
            assert_eq!(components(path.as_bytes()).as_deref(), Ok(&names[..]));
        }
        assert_eq!(split(b"/a/b"), Ok(Some((vec![names[0]], names[1]))));
        assert_eq!(split(b"/./"), Ok(None), "the root");
    }

    #[test]
    fn a_links_target_may_lead_up() {
        let names: [&[u8]; 3] = [b"..", b"usr", b"lib"];
        assert_eq!(target_names(b"../usr//lib").as_deref(), Ok(&names[..]));
        let long = "n".repeat(256);
        assert_eq!(target_names(long.as_bytes()), Err(PathError::BadName));
    }
}
