// SPDX-License-Identifier: Apache-2.0
//! A cluster that `scripts/cluster` brought up: `kubectl` as a user has it, and commands on a node.
//!
//! The tests of a cluster run beside each other in it, each in a namespace of its own.

use std::fmt::Display;
use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::node::with;
use crate::wait::try_until_blocking;

/// Set by `scripts/cluster`, as KUBECONFIG is.
const REGISTRY_VARIABLE: &str = "BULKHEAD_REGISTRY";
const PROJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// How long a test waits for a state. The pods of several tests start at once, on one emulated CPU.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// The class of pods in microVMs.
pub const RUNTIME_CLASS: &str = "bulkhead";
/// A container's script that runs until SIGTERM, which it obeys at once.
pub const STAY: &str = "trap 'exit 0' TERM; sleep 100000 & wait";
/// The same, but it fails then. kubelet calls an evicted pod
/// Succeeded, and forgets why it was evicted, if its containers end with 0 in the second that it gives them.
pub const FAIL_AT_THE_END: &str = "trap 'exit 1' TERM; sleep 100000 & wait";
/// The first node, and its address.
pub const NODE: &str = "node-1";
pub const NODE_ADDRESS: &str = "10.99.0.2";

/// A namespace of the cluster. It is deleted on drop, without waiting.
#[derive(Debug)]
pub struct Namespace {
    pub name: String,
}

/// What a command printed, if it succeeded; else what it said.
pub type Said = Result<String, String>;

impl Namespace {
    pub fn new(name: &str) -> Self {
        let manifest = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let namespace = Self { name: name.into() };
        apply_all(&[manifest]);
        // A pod is refused before its namespace has a service account.
        namespace.until("there is a default service account", || {
            namespace
                .kubectl(&["get", "serviceaccount", "default"])
                .ok()
        });
        namespace
    }

    /// Runs kubectl in this namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> Said {
        said(&self.command(arguments).output().expect("run kubectl"))
    }

    /// Runs kubectl and expects success.
    pub fn get(&self, arguments: &[&str]) -> String {
        let said = self.kubectl(arguments);
        said.unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    /// The object of a kind with a name.
    pub fn object(&self, kind: &str, name: &str) -> Value {
        let text = self.kubectl(&["get", kind, name, "-o", "json"]);
        text.ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or(Value::Null)
    }

    /// The objects of a kind that a selector finds.
    pub fn objects(&self, kind: &str, selector: &str) -> Vec<Value> {
        let text = self.get(&["get", kind, "-l", selector, "-o", "json"]);
        let list: Value = serde_json::from_str(&text).expect("kubectl's JSON");
        list["items"].as_array().cloned().unwrap_or_default()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = kubectl();
        command.args(["-n", &self.name]).args(arguments);
        command
    }

    /// Starts kubectl with pipes to it. It is killed on drop.
    pub fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Running(command.spawn().expect("run kubectl"))
    }

    /// Makes objects in this namespace.
    pub fn apply(&self, objects: &[Value]) {
        let own = objects.iter().cloned().map(|mut object| {
            object["metadata"]["namespace"] = self.name.clone().into();
            object
        });
        apply_all(&own.collect::<Vec<_>>());
    }

    /// Waits until `look` finds something. If it does not, shows the namespace.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let look = || look().ok_or_else(|| "not that".to_owned());
        try_until_blocking(what, PATIENCE, look).unwrap_or_else(|late| self.give_up(late))
    }

    /// Waits for what `kubectl wait` knows: `condition=Ready`, of an object that exists. If it does not come, shows the
    /// namespace.
    pub fn wait(&self, object: &str, what: &str) {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        let said = self.kubectl(&["wait", object, &format!("--for={what}"), &timeout]);
        if let Err(error) = said {
            self.give_up(error);
        }
    }

    /// Waits until a controller has replaced all its pods.
    pub fn wait_for_rollout(&self, controller: &str) {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        if let Err(error) = self.kubectl(&["rollout", "status", controller, &timeout]) {
            self.give_up(error);
        }
    }

    fn give_up(&self, what: impl Display) -> ! {
        let pods = either(self.kubectl(&["get", "pods", "-o", "wide"]));
        let events = either(self.kubectl(&["get", "events", "--sort-by=.lastTimestamp"]));
        panic!("{}: {what}\n{pods}\n{events}", self.name);
    }

    /// Waits until a pod's phase is this one. Returns the pod.
    pub fn until_phase(&self, name: &str, phase: &str) -> Value {
        self.wait(
            &format!("pod/{name}"),
            &format!("jsonpath={{.status.phase}}={phase}"),
        );
        self.object("pod", name)
    }

    pub fn until_ready(&self, name: &str) -> Value {
        self.wait(&format!("pod/{name}"), "condition=Ready");
        self.object("pod", name)
    }

    /// Waits until a pod's log has a text. Returns the log.
    pub fn until_logged(&self, pod: &str, text: &str) -> String {
        self.until(&format!("{pod} logs {text}"), || {
            let log = self.kubectl(&["logs", pod]).unwrap_or_default();
            log.contains(text).then_some(log)
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The cluster ends soon; this frees the node's memory for others.
        let _ = kubectl()
            .args(["delete", "namespace", &self.name, "--wait=false"])
            .output();
    }
}

/// A process that is killed on drop.
#[derive(Debug)]
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn kubectl() -> Command {
    assert!(
        std::env::var_os("KUBECONFIG").is_some(),
        "KUBECONFIG is not set: these tests need a cluster, run scripts/test --only 'cluster tests'"
    );
    Command::new("kubectl")
}

/// Makes objects that are in no namespace or that name theirs.
pub fn apply_all(objects: &[Value]) {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    let output = with_input(kubectl().args(["apply", "-f", "-"]), &list.to_string());
    said(&output).expect("kubectl apply");
}

/// Runs kubectl without a namespace.
pub fn cluster(arguments: &[&str]) -> Said {
    said(&kubectl().args(arguments).output().expect("run kubectl"))
}

/// Runs a command with standard input.
pub fn with_input(command: &mut Command, input: &str) -> Output {
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = pipes.stderr(Stdio::piped()).spawn().expect("run kubectl");
    let mut stdin = child.stdin.take().expect("its standard input");
    stdin.write_all(input.as_bytes()).expect("write to kubectl");
    drop(stdin);
    child.wait_with_output().expect("wait for kubectl")
}

/// Runs a shell line on the first node.
pub fn on_node(line: &str) -> Said {
    let output = Command::new(format!("{PROJECT}/scripts/cluster"))
        .args(["--node", "1", "sh", "-c", line])
        .output();
    said(&output.expect("run scripts/cluster"))
}

pub fn said(output: &Output) -> Said {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(out);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}: {out}{error}", output.status))
}

/// What was printed or said.
pub fn either(said: Said) -> String {
    said.unwrap_or_else(|error| error)
}

/// The reference of an image in the cluster's registry.
pub fn image(name: &str) -> String {
    let registry = std::env::var(REGISTRY_VARIABLE);
    let registry = registry.unwrap_or_else(|_| panic!("{REGISTRY_VARIABLE} is not set"));
    format!("{registry}/{name}")
}

/// A busybox container that runs a script, with further fields.
pub fn script(name: &str, script: &str, more: Value) -> Value {
    let container = json!({
        "name": name,
        "image": image("test/busybox"),
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
    });
    with(container, more)
}

/// The spec of a pod in a microVM.
pub fn spec(containers: Value, more: Value) -> Value {
    let spec = json!({
        "runtimeClassName": RUNTIME_CLASS,
        "terminationGracePeriodSeconds": 1,
        "enableServiceLinks": false,
        "containers": containers,
    });
    with(spec, more)
}

/// An object with a name, the label `app` of the same value, and fields beside its metadata.
pub fn object(kind: &str, name: &str, fields: Value) -> Value {
    let version = match kind {
        "Deployment" | "StatefulSet" | "DaemonSet" => "apps/v1",
        "Job" => "batch/v1",
        "PriorityClass" => "scheduling.k8s.io/v1",
        "RuntimeClass" => "node.k8s.io/v1",
        _ => "v1",
    };
    let base = json!({
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": {"app": name}},
    });
    with(base, fields)
}

/// A pod that runs one script.
pub fn pod(name: &str, line: &str, container: Value, more: Value) -> Value {
    let containers = json!([script("main", line, container)]);
    object("Pod", name, json!({"spec": spec(containers, more)}))
}

/// The template of a controller's pods, which have the label `app`, and the selector that finds them.
pub fn template(app: &str, spec: Value) -> Value {
    let labels = json!({"app": app});
    json!({
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": spec},
    })
}
