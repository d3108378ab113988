// SPDX-License-Identifier: Apache-2.0
//! The file of a database: how it is made and opened.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, TableDefinition};

use crate::error::RecordsError;

/// Records may hold secrets, such as the environment of a container.
const MODE: u32 = 0o600;

/// A table, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table(&'static str);

impl Table {
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    fn name(self) -> &'static str {
        self.0
    }

    pub(crate) fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.0)
    }
}

/// Where records are, and which tables there must be.
#[derive(Clone, Debug)]
pub struct Place {
    pub path: PathBuf,
    /// A file whose space is given up when the disk is full.
    pub reserve: PathBuf,
    pub tables: &'static [Table],
}

/// How a database is opened. Tests use another function.
pub type Open = fn(&Path) -> Result<Database, DatabaseError>;

/// Opens the file, or makes it.
pub fn open_or_make(place: &Place, open: Open) -> Result<Database, RecordsError> {
    let path = &place.path;
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() == 0 => Err(empty(path)),
        Ok(_) => {
            fs::set_permissions(path, Permissions::from_mode(MODE))
                .map_err(RecordsError::file("change the mode of", path))?;
            let database = open(path).map_err(|error| RecordsError::of("open", path, error))?;
            // A table that this version has added.
            make_tables(&database, place)?;
            Ok(database)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(place, open),
        Err(error) => Err(RecordsError::file("look at", path)(error)),
    }
}

/// redb would take an empty file for a new database, and its records would be forgotten.
pub fn empty(path: &Path) -> RecordsError {
    RecordsError::Damaged {
        path: path.to_owned(),
        why: "it is empty".to_owned(),
    }
}

/// Makes a database under another name first: so what has the name is never half made, and an empty file is always
/// damage.
fn make(place: &Place, open: Open) -> Result<Database, RecordsError> {
    let path = &place.path;
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(MODE);
    let file = options
        .open(&new)
        .map_err(RecordsError::file("create", &new))?;
    let database = FileBackend::new(file)
        .and_then(|backend| Builder::new().create_with_backend(backend))
        .map_err(|error| RecordsError::of("create", &new, error))?;
    make_tables(&database, place)?;
    drop(database);
    fs::rename(&new, path).map_err(RecordsError::file("rename", &new))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(RecordsError::file("sync", directory))?;
    open(path).map_err(|error| RecordsError::of("open", path, error))
}

/// Makes the tables that do not exist, because reading one of these would be an error.
fn make_tables(database: &Database, place: &Place) -> Result<(), RecordsError> {
    let failed = |error: redb::Error| RecordsError::of("read", &place.path, error);
    if has_tables(database, place.tables).map_err(failed)? {
        return Ok(());
    }
    let make = || -> Result<(), redb::Error> {
        let transaction = database.begin_write()?;
        for table in place.tables {
            transaction.open_table(table.definition())?;
        }
        Ok(transaction.commit()?)
    };
    make().map_err(|error| RecordsError::of("make the tables of", &place.path, error))
}

/// Asked first, because a disk may be too full to write.
fn has_tables(database: &Database, tables: &[Table]) -> Result<bool, redb::Error> {
    use redb::{ReadableDatabase, TableHandle};
    let names: Vec<String> = database
        .begin_read()?
        .list_tables()?
        .map(|table| table.name().to_owned())
        .collect();
    Ok(tables
        .iter()
        .all(|table| names.iter().any(|name| name == table.name())))
}
