// SPDX-License-Identifier: Apache-2.0
//! The files of one layer, built from tar entries: names, attributes, and where the data are.
//!
//! Paths ([`super::path`]) never reach the host's file system. Symbolic links are followed only within this tree.

use std::cell::Cell;
use std::collections::VecDeque;

use super::memory::Share;
use super::node::{
    Attributes, ENTRY_BYTES, Kind, NODE_BYTES, Node, NodeId, OVERLAY_IMPLIED, OVERLAY_OPAQUE,
};
use super::path::{MAX_DEPTH, PathError, components, split, target_names};

const MAX_LINKS_FOLLOWED: usize = 40;
/// The most files of one layer, and the most memory that it may take here and while it is written.
const MAX_NODES: usize = 1 << 20;
const MAX_METADATA_BYTES: usize = 256 << 20;
/// The most names to look up for all files of a layer, 64 for each of [`MAX_NODES`]. A path through links that lead
/// through links takes many steps.
const MAX_STEPS: usize = 1 << 26;

/// Why a file cannot be added to a layer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("a parent is not a directory")]
    NotDirectory,
    #[error("symbolic links form a loop")]
    LinkLoop,
    #[error("the target of the hard link is not a file of this layer")]
    NoTarget,
    #[error(
        "more than {MAX_NODES} files, {MAX_METADATA_BYTES} bytes of names and attributes or too many links to follow in \
         one layer"
    )]
    TooLarge,
    #[error(
        "other layers with very many files are being unpacked and take all memory for that; try again later"
    )]
    NoMemory,
}

/// A layer's files. There is always a root directory.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    memory: Share,
    steps: Cell<usize>,
}

impl Tree {
    pub fn new(memory: Share) -> Self {
        Self {
            nodes: vec![Node::root()],
            memory,
            steps: Cell::new(0),
        }
    }

    pub fn node(&self, id: NodeId) -> &Node {
        // Ids come only from this tree, and nodes are never removed.
        #[expect(clippy::indexing_slicing)]
        &self.nodes[id.index()]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        #[expect(clippy::indexing_slicing)]
        &mut self.nodes[id.index()]
    }

    /// How many nodes were ever added; every index is less than this.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Puts a file at `path` and replaces what is there. A directory that replaces a directory keeps the children.
    pub fn insert(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        kind: Kind,
    ) -> Result<(), TreeError> {
        let Some((parents, name)) = split(path)? else {
            // The root itself: only its attributes can be set.
            return match kind {
                Kind::Directory(_) => self.replace_attributes(NodeId::ROOT, attributes),
                _ => Err(PathError::BadName.into()),
            };
        };
        let parent = self.directory(&parents)?;
        if let (Kind::Directory(_), Some(existing)) = (&kind, self.child(parent, name)) {
            if self.node(existing).kind == Kind::WHITEOUT {
                self.make_directory(parent, name)?;
                return self.insert(path, attributes, kind);
            }
            if matches!(self.node(existing).kind, Kind::Directory(_)) {
                return self.replace_attributes(existing, attributes);
            }
        }
        let id = self.add(Node { attributes, kind })?;
        self.link(parent, name, id)
    }

    /// Gives the file at `target` another name, `path`.
    pub fn insert_hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let (target_parents, target_name) = split(target)?.ok_or(TreeError::NoTarget)?;
        let target_parent = self
            .existing_directory(&target_parents)
            .ok_or(TreeError::NoTarget)?;
        let target = self
            .child(target_parent, target_name)
            .ok_or(TreeError::NoTarget)?;
        if matches!(self.node(target).kind, Kind::Directory(_)) {
            return Err(TreeError::NoTarget);
        }
        let (parents, name) = split(path)?.ok_or(PathError::BadName)?;
        let parent = self.directory(&parents)?;
        self.link(parent, name, target)
    }

    /// Hides `name` of the layers below. A file with this name in this layer stays.
    pub fn insert_whiteout(&mut self, directory: &[u8], name: &[u8]) -> Result<(), TreeError> {
        if name.is_empty() || matches!(name, b"." | b"..") {
            return Err(PathError::BadName.into());
        }
        let parents = components(directory)?;
        components(name)?;
        let parent = self.directory(&parents)?;
        match self.child(parent, name) {
            Some(existing) => {
                let node = self.node_mut(existing);
                if matches!(node.kind, Kind::Directory(_)) {
                    node.replace_lower();
                }
                Ok(())
            }
            None => {
                let id = self.add(Node {
                    attributes: Attributes::default(),
                    kind: Kind::WHITEOUT,
                })?;
                self.link(parent, name, id)
            }
        }
    }

    /// Marks the directory at `path` as opaque: overlayfs then hides everything that lower layers have in it
    /// (Documentation/filesystems/overlayfs, "opaque directories").
    pub fn set_opaque(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let components = components(path)?;
        let directory = self.directory(&components)?;
        self.node_mut(directory).set_opaque();
        Ok(())
    }

    /// Marks the directories that lead to implied ones. Call it when all entries have been read.
    pub fn mark_ways_to_implied(&mut self) -> Result<(), TreeError> {
        const NONE: u32 = u32::MAX;
        let mut parents = vec![NONE; self.nodes.len()];
        for (parent, node) in (0u32..).zip(&self.nodes) {
            let Kind::Directory(children) = &node.kind else {
                continue;
            };
            for child in children.values() {
                if let Some(place) = parents.get_mut(child.index()) {
                    *place = parent;
                }
            }
        }
        // A directory is made after the one that it is in.
        for (index, parent) in parents.into_iter().enumerate().rev() {
            let is_marked = self.nodes.get(index).is_some_and(Node::is_marked);
            if parent == NONE || !is_marked || self.node(NodeId(parent)).is_marked() {
                continue;
            }
            let parent = self.node_mut(NodeId(parent));
            parent.mark_above_implied();
            self.charge(ENTRY_BYTES + OVERLAY_IMPLIED.len() + 1)?;
        }
        Ok(())
    }

    fn replace_attributes(
        &mut self,
        id: NodeId,
        mut attributes: Attributes,
    ) -> Result<(), TreeError> {
        self.charge(attributes.xattr_bytes())?;
        let node = self.node_mut(id);
        // Keep the opaque mark, which may have come before the directory's own entry.
        if let Some(mark) = node.attributes.xattrs.remove(OVERLAY_OPAQUE) {
            attributes.xattrs.insert(OVERLAY_OPAQUE.into(), mark);
        }
        node.attributes = attributes;
        Ok(())
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(parent).kind {
            Kind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn link(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), TreeError> {
        self.charge(ENTRY_BYTES + name.len())?;
        match &mut self.node_mut(parent).kind {
            Kind::Directory(children) => {
                children.insert(name.into(), id);
                Ok(())
            }
            _ => Err(TreeError::NotDirectory),
        }
    }

    fn add(&mut self, node: Node) -> Result<NodeId, TreeError> {
        let target_bytes = match &node.kind {
            Kind::Symlink(target) => target.len(),
            _ => 0,
        };
        self.charge(NODE_BYTES + target_bytes + node.attributes.xattr_bytes())?;
        if self.nodes.len() >= MAX_NODES {
            return Err(TreeError::TooLarge);
        }
        let id = u32::try_from(self.nodes.len()).map_err(|_| TreeError::TooLarge)?;
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    fn charge(&mut self, bytes: usize) -> Result<(), TreeError> {
        if self.memory.used_bytes().saturating_add(bytes) > MAX_METADATA_BYTES {
            return Err(TreeError::TooLarge);
        }
        match self.memory.take(bytes) {
            true => Ok(()),
            false => Err(TreeError::NoMemory),
        }
    }

    fn count_steps(&self, steps: usize) -> Result<(), TreeError> {
        self.steps.set(self.steps.get() + steps);
        match self.steps.get() > MAX_STEPS {
            true => Err(TreeError::TooLarge),
            false => Ok(()),
        }
    }

    /// The directory at `components`. Missing directories are created.
    fn directory(&mut self, components: &[&[u8]]) -> Result<NodeId, TreeError> {
        match self.walk(components)? {
            Walk::Found(id) => Ok(id),
            Walk::Missing { at, rest } => {
                let mut directory = at;
                for name in rest {
                    directory = self.make_directory(directory, &name)?;
                }
                Ok(directory)
            }
        }
    }

    /// Creates a directory for which no entry has been read yet. If it replaces a whiteout, it becomes opaque, so that
    /// lower layers stay hidden.
    fn make_directory(&mut self, parent: NodeId, name: &[u8]) -> Result<NodeId, TreeError> {
        let mut node = Node::implied_directory();
        if self.child(parent, name).is_some() {
            node.replace_lower();
        }
        let id = self.add(node)?;
        self.link(parent, name, id)?;
        Ok(id)
    }

    fn existing_directory(&self, components: &[&[u8]]) -> Option<NodeId> {
        match self.walk(components) {
            Ok(Walk::Found(id)) => Some(id),
            _ => None,
        }
    }

    /// Follows `components` from the root, including symbolic links of this layer, and never leaves the root.
    fn walk(&self, components: &[&[u8]]) -> Result<Walk, TreeError> {
        let mut queue: VecDeque<Box<[u8]>> = components.iter().map(|&name| name.into()).collect();
        let mut path = vec![NodeId::ROOT];
        let mut links = 0;
        while let Some(name) = queue.pop_front() {
            self.count_steps(1)?;
            if *name == *b".." {
                // Only a link's target can contain this.
                if path.len() > 1 {
                    path.pop();
                }
                continue;
            }
            let here = path.last().copied().unwrap_or(NodeId::ROOT);
            let child = self.child(here, &name);
            let child = child.filter(|child| self.node(*child).kind != Kind::WHITEOUT);
            let Some(child) = child else {
                queue.push_front(name);
                if queue.iter().any(|name| **name == *b"..") {
                    return Err(TreeError::NotDirectory);
                }
                return Ok(Walk::Missing {
                    at: here,
                    rest: queue.into(),
                });
            };
            match &self.node(child).kind {
                Kind::Directory(_) => path.push(child),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS_FOLLOWED {
                        return Err(TreeError::LinkLoop);
                    }
                    if target.starts_with(b"/") {
                        path.truncate(1);
                    }
                    let names = target_names(target)?;
                    // To split a target is work, too, even if the walk ends at its first name.
                    self.count_steps(names.len())?;
                    for name in names.into_iter().rev() {
                        queue.push_front(name.into());
                    }
                }
                _ => return Err(TreeError::NotDirectory),
            }
            if path.len() + queue.len() > MAX_DEPTH {
                return Err(PathError::TooDeep.into());
            }
        }
        Ok(Walk::Found(path.last().copied().unwrap_or(NodeId::ROOT)))
    }
}

/// The end of a walk: the directory, or where the first missing name would be and which names are missing.
enum Walk {
    Found(NodeId),
    Missing { at: NodeId, rest: Vec<Box<[u8]>> },
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;

    fn new_tree() -> Tree {
        Tree::new(Share::new(&Arc::default()))
    }

    fn insert(tree: &mut Tree, path: &str, kind: Kind) -> Result<(), TreeError> {
        tree.insert(path.as_bytes(), Attributes::default(), kind)
    }

    fn find(tree: &Tree, path: &str) -> Option<NodeId> {
        let (parents, name) = split(path.as_bytes()).unwrap().unwrap();
        tree.child(tree.existing_directory(&parents)?, name)
    }

    #[test]
    fn a_hostile_path_is_not_inserted() {
        let refused = insert(&mut new_tree(), "a/../../b", Kind::Fifo);
        assert_eq!(refused, Err(TreeError::Path(PathError::DotDot)));
    }

    #[test]
    fn absolute_and_dotted_names_are_the_same_file() {
        let mut tree = new_tree();
        insert(&mut tree, "/a//./b/", Kind::directory()).unwrap();
        insert(&mut tree, "./a/b/c", Kind::Fifo).unwrap();
        assert!(find(&tree, "a/b/c").is_some());
    }

    #[test]
    fn links_are_followed_inside_the_tree_only() {
        let mut tree = new_tree();
        insert(&mut tree, "usr/lib", Kind::directory()).unwrap();
        insert(&mut tree, "lib", Kind::Symlink((*b"../../usr/lib").into())).unwrap();
        insert(&mut tree, "lib/libc.so", Kind::Fifo).unwrap();
        assert!(find(&tree, "usr/lib/libc.so").is_some());
        insert(&mut tree, "loop", Kind::Symlink((*b"/loop/x").into())).unwrap();
        assert_eq!(
            insert(&mut tree, "loop/y", Kind::Fifo),
            Err(TreeError::LinkLoop)
        );
    }

    #[test]
    fn what_comes_later_replaces_what_came_before() {
        let mut tree = new_tree();
        insert(&mut tree, "a/file", Kind::Fifo).unwrap();
        tree.set_opaque(b"a").unwrap();
        insert(&mut tree, "a", Kind::directory()).unwrap();
        let a = find(&tree, "a").unwrap();
        assert!(find(&tree, "a/file").is_some());
        assert!(tree.node(a).attributes.xattrs.contains_key(OVERLAY_OPAQUE));
        insert(&mut tree, "a", Kind::Fifo).unwrap();
        assert!(find(&tree, "a/file").is_none());
        assert_eq!(
            insert(&mut tree, "a/file", Kind::Fifo),
            Err(TreeError::NotDirectory)
        );
    }

    #[test]
    fn directories_without_an_entry_and_the_ways_to_them_are_marked() {
        let mut tree = new_tree();
        insert(&mut tree, "own", Kind::directory()).unwrap();
        insert(&mut tree, "own/implied/file", Kind::Fifo).unwrap();
        insert(&mut tree, "late/deep/file", Kind::Fifo).unwrap();
        insert(&mut tree, "late", Kind::directory()).unwrap();
        insert(&mut tree, "plain", Kind::directory()).unwrap();
        insert(&mut tree, "replaced/file", Kind::Fifo).unwrap();
        insert(&mut tree, "replaced", Kind::Fifo).unwrap();
        tree.set_opaque(b"emptied").unwrap();
        tree.insert_whiteout(b"", b"new").unwrap();
        insert(&mut tree, "new/file", Kind::Fifo).unwrap();
        insert(&mut tree, "newer/file", Kind::Fifo).unwrap();
        tree.insert_whiteout(b"", b"newer").unwrap();
        tree.mark_ways_to_implied().unwrap();
        let mark = |id: NodeId| {
            let mark = tree.node(id).attributes.xattrs.get(OVERLAY_IMPLIED);
            mark.map(|value| value.to_vec())
        };
        assert_eq!(mark(NodeId::ROOT).as_deref(), Some(&b"b"[..]));
        for (path, value) in [
            ("own", Some(&b"b"[..])),
            ("own/implied", Some(b"y")),
            ("own/implied/file", None),
            ("late", Some(b"b")),
            ("late/deep", Some(b"y")),
            ("plain", None),
            ("replaced", None),
            ("emptied", Some(b"y")),
            ("new", None),
            ("newer", None),
        ] {
            let id = find(&tree, path).unwrap();
            assert_eq!(mark(id).as_deref(), value, "{path}");
        }
    }

    #[test]
    fn a_whiteout_hides_only_what_is_below() {
        let opaque = |tree: &Tree, path| {
            let node = tree.node(find(tree, path).unwrap());
            node.attributes.xattrs.contains_key(OVERLAY_OPAQUE)
        };
        let mut tree = new_tree();
        tree.insert_whiteout(b"", b"before").unwrap();
        insert(&mut tree, "before", Kind::directory()).unwrap();
        tree.insert_whiteout(b"", b"implied").unwrap();
        insert(&mut tree, "implied/file", Kind::Fifo).unwrap();
        insert(&mut tree, "after", Kind::directory()).unwrap();
        tree.insert_whiteout(b"", b"after").unwrap();
        for path in ["before", "implied", "after"] {
            assert!(opaque(&tree, path), "{path}");
        }
        insert(&mut tree, "file", Kind::Fifo).unwrap();
        tree.insert_whiteout(b"/", b"file").unwrap();
        assert_eq!(tree.node(find(&tree, "file").unwrap()).kind, Kind::Fifo);
        for name in ["", ".", "..", "a\0"] {
            assert!(
                tree.insert_whiteout(b"", name.as_bytes()).is_err(),
                "{name:?}"
            );
        }
    }

    #[test]
    fn hard_links_need_a_file_of_this_layer() {
        let mut tree = new_tree();
        insert(&mut tree, "a", Kind::Fifo).unwrap();
        insert(&mut tree, "d", Kind::directory()).unwrap();
        tree.insert_hard_link(b"b", b"/a").unwrap();
        assert_eq!(find(&tree, "b"), find(&tree, "a"));
        for target in ["nothing", "d", "../a", ""] {
            let result = tree.insert_hard_link(b"c", target.as_bytes());
            assert!(result.is_err(), "{target}");
        }
    }

    #[test]
    fn what_costs_memory_or_time_is_counted() {
        let fill = |step: &dyn Fn(&mut Tree, usize) -> Result<(), TreeError>| {
            let mut tree = new_tree();
            insert(&mut tree, "a", Kind::Fifo).unwrap();
            insert(&mut tree, "d", Kind::directory()).unwrap();
            assert!(
                tree.memory
                    .take(MAX_METADATA_BYTES - (100 << 10) - tree.memory.used_bytes())
            );
            tree.steps.set(MAX_STEPS - 1000);
            (0..10_000).find_map(|number| step(&mut tree, number).err())
        };
        let attributes = |bytes: usize| Attributes {
            xattrs: BTreeMap::from([((*b"user.x").into(), vec![0; bytes].into())]),
            ..Attributes::default()
        };
        let too_large = Some(TreeError::TooLarge);
        let hard_links =
            fill(&|tree, number| tree.insert_hard_link(format!("{number}").as_bytes(), b"a"));
        assert_eq!(hard_links, too_large, "names of one file");
        let again = fill(&|tree, _| tree.insert(b"d", attributes(60_000), Kind::directory()));
        assert_eq!(again, too_large, "attributes told again");
        let again = fill(&|tree, _| tree.insert(b"/", attributes(60_000), Kind::directory()));
        assert_eq!(again, too_large, "attributes of the root told again");
        let files = fill(&|tree, _| insert(tree, "a", Kind::Fifo));
        assert_eq!(files, too_large, "files that replace each other");
        let walks = fill(&|tree, _| tree.set_opaque(b"d"));
        assert_eq!(walks, too_large, "walks");
    }

    #[test]
    fn a_link_costs_as_many_steps_as_its_target_has_names() {
        let mut tree = new_tree();
        let target = "../".repeat(1000) + "x";
        insert(&mut tree, "link", Kind::Symlink(target.as_bytes().into())).unwrap();
        let before = tree.steps.get();
        let refused = tree.insert_hard_link(b"y", b"link/z/file");
        assert_eq!(refused, Err(TreeError::NoTarget));
        assert!(tree.steps.get() - before > 1000, "{}", tree.steps.get());
    }
}
