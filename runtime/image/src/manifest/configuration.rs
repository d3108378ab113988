// SPDX-License-Identifier: Apache-2.0
//! Image configurations (image-spec, config.md): the defaults for containers, and the diff ids of the layers.
//!
//! What is read here is kept in the image's record, is listed to kubelet and goes into every container of the image.
//! Therefore each part has a bound. Lists are counted while they are parsed, so that a document of many tiny entries
//! does not take many times its size in memory. Other fields (`ExposedPorts`, `history`) are not read at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{ManifestError, Platform, unreadable};
use crate::digest::Digest;

/// The most variables, arguments or labels. Real images have some hundred at most.
const MAX_ENTRIES: usize = 10_000;
/// The most volumes that an image may declare. Each is a directory and a mount of every container. Real images have a
/// handful.
const MAX_VOLUMES: usize = 128;
/// The most bytes of a variable or an argument: `MAX_ARG_STRLEN`, above which Linux does not execute a program.
const MAX_ARGUMENT_BYTES: usize = 128 << 10;
/// The most bytes of the user, the working directory, the stop signal and the path of a volume, each: `PATH_MAX`. kubelet
/// accepts lists of images of up to 16 MiB, and the user is in them.
const MAX_TEXT_BYTES: usize = 4 << 10;
/// The most bytes of all parts together. Linux executes no program with more than 2 MiB of variables and arguments
/// under the usual limit of the stack. Labels can be long (those of buildpacks have some 100 KiB).
const MAX_TOTAL_BYTES: usize = 1 << 20;

/// The defaults of an image for its containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageDefaults {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
    pub stop_signal: String,
    pub labels: BTreeMap<String, String>,
    /// The paths at which containers get volumes of their own (`VOLUME` of a Dockerfile), as the image's author wrote
    /// them. Records of earlier versions lack them until the image is pulled again.
    pub volumes: BTreeSet<String>,
}

/// The parts of an image configuration that we use.
#[derive(Debug)]
pub struct ImageConfig {
    pub defaults: ImageDefaults,
    /// The diff ids of the layers, the bottom one first.
    pub diff_ids: Vec<Digest>,
    pub platform: Platform,
}

/// The document as a registry sends it. Go programs write null for an empty list or map.
#[derive(Deserialize)]
struct Document {
    config: Option<Settings>,
    rootfs: Rootfs,
    architecture: Option<String>,
    os: Option<String>,
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Settings {
    entrypoint: Entries<Vec<String>>,
    cmd: Entries<Vec<String>>,
    env: Entries<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
    labels: Entries<BTreeMap<String, String>>,
    volumes: Entries<BTreeSet<String>>,
}

impl ImageConfig {
    /// Parses a configuration and checks that it belongs to an image of `layers` layers.
    pub fn parse(bytes: &[u8], layers: usize) -> Result<Self, ManifestError> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|e| unreadable("image configuration", &e))?;
        let diff_ids = document.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() != layers {
            return Err(ManifestError::LayerCount {
                layers,
                diff_ids: diff_ids.len(),
            });
        }
        let settings = document.config.unwrap_or_default();
        let defaults = ImageDefaults {
            entrypoint: settings.entrypoint.0,
            cmd: settings.cmd.0,
            env: settings.env.0,
            working_dir: settings.working_dir.unwrap_or_default(),
            user: settings.user.unwrap_or_default(),
            stop_signal: settings.stop_signal.unwrap_or_default(),
            labels: settings.labels.0,
            volumes: settings.volumes.0,
        };
        defaults.check_sizes()?;
        Ok(Self {
            defaults,
            diff_ids,
            platform: Platform::new(document.os, document.architecture),
        })
    }
}

impl ImageDefaults {
    fn check_sizes(&self) -> Result<(), ManifestError> {
        let at_most = |most_bytes, what, bytes| match bytes {
            bytes if bytes > most_bytes => Err(ManifestError::ConfigSize {
                what,
                bytes,
                most_bytes,
            }),
            _ => Ok(()),
        };
        let texts = [
            ("User", &self.user),
            ("WorkingDir", &self.working_dir),
            ("StopSignal", &self.stop_signal),
        ];
        let lists = [
            ("one variable in Env", &self.env),
            ("one argument in Cmd", &self.cmd),
            ("one argument in Entrypoint", &self.entrypoint),
        ];
        let mut total = 0;
        for (what, text) in texts {
            at_most(MAX_TEXT_BYTES, what, text.len())?;
            total += text.len();
        }
        for (what, list) in lists {
            for entry in list {
                at_most(MAX_ARGUMENT_BYTES, what, entry.len())?;
                total += entry.len();
            }
        }
        for (key, value) in &self.labels {
            total += key.len() + value.len();
        }
        for path in &self.volumes {
            at_most(MAX_TEXT_BYTES, "one path in Volumes", path.len())?;
            total += path.len();
        }
        let what = "variables, arguments, labels and other defaults";
        at_most(MAX_TOTAL_BYTES, what, total)
    }
}

/// A list or a map of at most [`MAX_ENTRIES`] strings, or null for an empty one.
#[derive(Default)]
struct Entries<T>(T);

impl<'de> Deserialize<'de> for Entries<Vec<String>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Entries<Vec<String>>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of strings")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Entries::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = list.next_element()? {
                    room_after(entries.len())?;
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_any(List)
    }
}

impl<'de> Deserialize<'de> for Entries<BTreeMap<String, String>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Entries<BTreeMap<String, String>>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Entries::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry()? {
                    room_after(entries.len())?;
                    entries.insert(key, value);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_any(Map)
    }
}

/// Go's form of a set: a map to empty objects, of at most [`MAX_VOLUMES`] entries.
impl<'de> Deserialize<'de> for Entries<BTreeSet<String>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Set;
        impl<'de> Visitor<'de> for Set {
            type Value = Entries<BTreeSet<String>>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map whose keys are paths")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Entries::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeSet::new();
                while let Some((path, IgnoredAny)) = map.next_entry()? {
                    if entries.len() >= MAX_VOLUMES {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_VOLUMES} volumes"
                        )));
                    }
                    entries.insert(path);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_any(Set)
    }
}

/// Fails if there is no room for one more entry after `entries`.
fn room_after<E: Error>(entries: usize) -> Result<(), E> {
    if entries >= MAX_ENTRIES {
        return Err(E::custom(format_args!(
            "more than {MAX_ENTRIES} variables, arguments or labels"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::failure::FailureKind;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(config: &serde_json::Value) -> Result<ImageConfig, ManifestError> {
        let document = json!({ "config": config, "rootfs": { "diff_ids": [] } });
        ImageConfig::parse(document.to_string().as_bytes(), 0)
    }

    #[test]
    fn a_configuration_may_be_sparse_but_must_fit_its_layers() {
        let text = format!(
            r#"{{"config":{{"Env":null,"Labels":null,"Cmd":["sh"],"User":"7"}},"rootfs":{{"diff_ids":["{DIGEST}"]}}}}"#
        );
        let config = ImageConfig::parse(text.as_bytes(), 1).unwrap();
        assert_eq!(config.defaults.cmd, ["sh"]);
        assert_eq!(config.defaults.user, "7");
        assert!(ImageConfig::parse(text.as_bytes(), 2).is_err());
        assert!(ImageConfig::parse(br#"{"config":null,"rootfs":{"diff_ids":null}}"#, 0).is_ok());
        assert!(ImageConfig::parse(br#"{"rootfs":{"diff_ids":["sha256:../../x"]}}"#, 1).is_err());
    }

    #[test]
    fn volumes_are_the_keys_of_a_map() {
        let volumes = json!({ "Volumes": { "/data": {}, "/var/lib/docker": null, "odd": [1] } });
        let defaults = parse(&volumes).unwrap().defaults;
        let paths: Vec<_> = defaults.volumes.iter().map(String::as_str).collect();
        assert_eq!(paths, ["/data", "/var/lib/docker", "odd"]);
        let none = parse(&json!({ "Volumes": null })).unwrap().defaults;
        assert!(none.volumes.is_empty());
        let kept = serde_json::to_value(&defaults).unwrap();
        assert_eq!(
            serde_json::from_value::<ImageDefaults>(kept).unwrap(),
            defaults
        );
        parse(&json!({ "Volumes": ["/data"] })).unwrap_err();
    }

    #[test]
    fn what_is_as_large_as_it_may_be_is_taken_and_one_more_is_not() {
        let text = |bytes: usize| json!("x".repeat(bytes));
        let list = |entries: usize| json!(vec![""; entries]);
        let map = |entries: usize| {
            let pairs = (0..entries).map(|number| (number.to_string(), json!("")));
            json!(pairs.collect::<serde_json::Map<_, _>>())
        };
        type Make<'a> = &'a dyn Fn(usize) -> serde_json::Value;
        let one: Make<'_> = &|bytes| json!([text(bytes)]);
        let labels: Make<'_> = &|bytes| json!({ "": text(bytes) });
        let one_volume: Make<'_> = &|bytes| json!({ "x".repeat(bytes): {} });
        for (field, make, most) in [
            ("User", &text as Make<'_>, MAX_TEXT_BYTES),
            ("WorkingDir", &text, MAX_TEXT_BYTES),
            ("StopSignal", &text, MAX_TEXT_BYTES),
            ("Env", &list, MAX_ENTRIES),
            ("Cmd", &list, MAX_ENTRIES),
            ("Entrypoint", &list, MAX_ENTRIES),
            ("Labels", &map, MAX_ENTRIES),
            ("Volumes", &map, MAX_VOLUMES),
            ("Volumes", one_volume, MAX_TEXT_BYTES),
            ("Env", one, MAX_ARGUMENT_BYTES),
            ("Cmd", one, MAX_ARGUMENT_BYTES),
            ("Entrypoint", one, MAX_ARGUMENT_BYTES),
            ("Labels", labels, MAX_TOTAL_BYTES),
        ] {
            parse(&json!({ field: make(most) })).unwrap();
            let error = parse(&json!({ field: make(most + 1) })).unwrap_err();
            assert_eq!(error.kind(), FailureKind::Invalid, "{field}: {error}");
            assert!(error.to_string().len() < 300, "{field}: {error}");
        }
    }

    #[test]
    fn many_parts_that_are_small_enough_are_too_large_together() {
        let entry = "x".repeat(MAX_ARGUMENT_BYTES);
        let half = vec![entry; MAX_TOTAL_BYTES / MAX_ARGUMENT_BYTES / 2];
        parse(&json!({ "Env": half, "Cmd": half })).unwrap();
        let error = parse(&json!({ "Env": half, "Cmd": half, "User": "0" })).unwrap_err();
        assert!(
            matches!(error, ManifestError::ConfigSize { .. }),
            "{error:?}"
        );
    }

    #[test]
    fn a_long_list_ends_the_parsing_and_is_not_held() {
        // The document is cut after the entries: who reads further finds that it is not JSON.
        let cut = format!(r#"{{"config":{{"Env":[{}"#, r#""A=1","#.repeat(1_200_000));
        let error = ImageConfig::parse(cut.as_bytes(), 0).unwrap_err();
        assert!(error.to_string().contains("more than 10000"), "{error}");
    }
}
