// SPDX-License-Identifier: Apache-2.0
//! Services and DNS, seen from a pod and from outside.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use bulkhead_tests::cluster::{NODE_ADDRESS, Namespace, object, pod, script, spec, template};
use bulkhead_tests::node::with;
use bulkhead_tests::table::Table;
use serde_json::{Value, json};

const NAME: &str = "services";
/// The pods of the Service tell their names.
const SERVER: &str = "mkdir /www; hostname >/www/index.html; exec httpd -f -p 8080 -h /www";

fn service(name: &str, selector: &str, more: Value) -> Value {
    let ports = json!([{"port": 80, "targetPort": 8080}]);
    let spec = with(json!({"selector": {"app": selector}, "ports": ports}), more);
    object("Service", name, json!({"spec": spec}))
}

fn objects() -> Vec<Value> {
    let ready = json!({"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}});
    let server = spec(json!([script("main", SERVER, ready)]), json!({}));
    let servers = with(template("web", server), json!({"replicas": 2}));
    vec![
        object("Deployment", "web", json!({"spec": servers})),
        service("web", "web", json!({"type": "NodePort"})),
        service("sticky", "web", json!({"sessionAffinity": "ClientIP"})),
        service("headless", "web", json!({"clusterIP": "None"})),
        service("nobody", "nobody", json!({})),
        object(
            "Service",
            "alias",
            json!({"spec": {"type": "ExternalName", "externalName": format!("web.{NAME}.svc.cluster.local")}}),
        ),
        pod("client", "exec sleep 10000", json!({}), json!({})),
    ]
}

/// An HTTP request from outside of the cluster's pods. Returns the body.
fn fetch(address: &str) -> Result<String, String> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|error| format!("{address}: {error}"))?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
    Ok(body.unwrap_or(&answer).trim().to_owned())
}

/// What the client prints, one case a line: `case: what it saw`.
fn ask_from_a_pod(own: &Namespace) -> Vec<(String, String)> {
    let line = format!(
        "say() {{ echo \"$1: $(echo $2)\"; }}
        names() {{ for i in 1 2 3 4 5 6 7 8 9 10 11 12; do wget -qO- http://$1/; done | sort -u; }}
        addresses() {{ nslookup $1 | awk '/^Address/ && !/:53$/ {{print $NF}}' | sort -u; }}
        say cluster-ip \"$(names web)\"
        say long-name \"$(wget -qO- http://web.{NAME}.svc.cluster.local/)\"
        say sticky \"$(names sticky)\"
        say headless \"$(addresses headless.{NAME}.svc.cluster.local)\"
        say alias \"$(addresses alias.{NAME}.svc.cluster.local)\"
        say other \"$(addresses kube-dns.kube-system.svc.cluster.local)\"
        say unknown \"$(addresses no-such.{NAME}.svc.cluster.local)\"
        say nobody \"$(wget -qO- http://nobody/ 2>&1)\"
        say resolver \"$(grep search /etc/resolv.conf)\""
    );
    let said = own.get(&["exec", "client", "--", "sh", "-c", &line]);
    let cases = said.lines().filter_map(|line| line.split_once(": "));
    cases
        .map(|(case, seen)| (case.to_owned(), seen.to_owned()))
        .collect()
}

#[test]
fn pods_and_clients_outside_reach_services_by_address_and_name() {
    let own = Namespace::new(NAME);
    own.apply(&objects());
    own.wait_for_rollout("deployment/web");
    own.until_ready("client");
    let pods = own.objects("pods", "app=web");
    let set = |path: &str| -> BTreeSet<String> {
        let values = pods.iter().filter_map(|pod| pod.pointer(path)?.as_str());
        values.map(str::to_owned).collect()
    };
    let (names, addresses) = (set("/metadata/name"), set("/status/podIP"));
    // kube-proxy learns of a pod some time after the Deployment does.
    own.until("both pods of the Service answer", || {
        let line =
            "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do wget -qO- http://web/; done | sort -u | wc -l";
        let seen = own.kubectl(&["exec", "client", "--", "sh", "-c", line]);
        seen.is_ok_and(|count| count.trim() == "2").then_some(())
    });
    let said = ask_from_a_pod(&own);
    let words = |case: &str| -> BTreeSet<String> {
        let seen = said.iter().find(|one| one.0 == case);
        let seen = seen.map(|one| one.1.as_str()).unwrap_or_default();
        seen.split_whitespace().map(str::to_owned).collect()
    };
    let address = |name: &str| {
        let service = own.object("service", name);
        let address = service["spec"]["clusterIP"].as_str().unwrap_or_default();
        address.to_owned()
    };
    let mut table = Table::new("cluster: Services and DNS");
    table.equal(
        "a ClusterIP, by name: both pods answer",
        words("cluster-ip"),
        names.clone(),
    );
    let long = words("long-name");
    table.row(
        "the full name",
        long.is_subset(&names) && long.len() == 1,
        format!("{long:?}"),
    );
    let sticky = words("sticky");
    table.row(
        "sessionAffinity: one pod answers",
        sticky.is_subset(&names) && sticky.len() == 1,
        format!("{sticky:?}"),
    );
    table.equal(
        "a headless Service: the pods' addresses",
        words("headless"),
        addresses.clone(),
    );
    let alias = words("alias");
    table.row(
        "ExternalName",
        alias.contains(&address("web")),
        format!("{alias:?}"),
    );
    table.equal(
        "another namespace's Service",
        words("other"),
        BTreeSet::from(["10.96.0.10".to_owned()]),
    );
    table.equal(
        "a name that does not exist",
        words("unknown"),
        BTreeSet::new(),
    );
    let nobody = said
        .iter()
        .find(|one| one.0 == "nobody")
        .map(|one| one.1.clone());
    let refused = nobody.as_ref().is_some_and(|seen| seen.contains("refused"));
    table.row(
        "a Service without pods refuses",
        refused,
        format!("{nobody:?}"),
    );
    let search = words("resolver");
    table.row(
        "resolv.conf",
        search.contains(&format!("{NAME}.svc.cluster.local")),
        format!("{search:?}"),
    );

    let port = own.object("service", "web")["spec"]["ports"][0]["nodePort"].to_string();
    let seen = fetch(&format!("{NODE_ADDRESS}:{port}"));
    let right = seen.as_ref().is_ok_and(|name| names.contains(name));
    table.row("a NodePort, from outside", right, format!("{seen:?}"));
    let seen = fetch(&format!("{}:80", address("web")));
    let right = seen.as_ref().is_ok_and(|name| names.contains(name));
    table.row("a ClusterIP, from outside", right, format!("{seen:?}"));

    // A pod may get itself as the answer.
    own.get(&["scale", "deployment/web", "--replicas=1"]);
    own.until("one pod is left", || {
        (own.objects("pods", "app=web").len() == 1).then_some(())
    });
    let left = own.objects("pods", "app=web")[0]["metadata"]["name"].clone();
    let left = left.as_str().unwrap_or_default();
    let seen = own.kubectl(&["exec", left, "--", "wget", "-qO-", "http://web/"]);
    table.row(
        "a pod reaches itself by its Service",
        seen.as_ref().is_ok_and(|name| name.trim() == left),
        format!("{seen:?}"),
    );
    table.finish();
}
