"""daemonset.yaml is valid, and fits the program that it starts."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from migproxy import settings as options
from migproxy.announcement import TARGET_ANNOTATION
from migproxy.inventory import BYPASSED, FAILED, RELAYED, announcements
from migproxy.inventory.kube import LISTENING
from migproxy.pki import CLIENT_DIR, SERVER_DIR
from migproxy.settings import Settings

pytestmark = pytest.mark.tier("gate")

ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "daemonset.yaml", ROOT / "kustomization.yaml", *(ROOT / "deploy").rglob("*.yaml")])
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "daemonset.yaml").read_text()))
VERSIONS = ("1.30", "1.34", "1.37")
TLS_FOLDERS = (SERVER_DIR, CLIENT_DIR)
POD_IP = "fd00::7"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


def document(kind: str, name: str = "") -> dict[str, Any]:
    (found,) = [one for one in DOCUMENTS if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    return found


POD = document("DaemonSet")["spec"]["template"]["spec"]
RELAY, CONTAINER, FAILSAFE = POD["containers"]


def flags() -> dict[str, str | None]:
    """The container's flags and their values."""
    command, *arguments = CONTAINER["args"]
    assert command == "run"
    expanded = (one.replace("$(MY_POD_IP)", POD_IP) for one in arguments)  # as the kubelet does
    return {flag: value or None for flag, _, value in (one.partition("=") for one in expanded)}


def environment() -> dict[str, Any]:
    return {one["name"]: one for one in CONTAINER["env"]}


def effective(field: str) -> Any:
    """The value of a setting in the container, where it is a fixed one."""
    return flags().get(options.option(field), Settings.model_fields[field].default)


def mounts() -> dict[str, dict[str, Any]]:
    return {one["mountPath"]: one for one in CONTAINER["volumeMounts"]}


def volume(mount: dict[str, Any]) -> dict[str, Any]:
    (found,) = [one for one in POD["volumes"] if one["name"] == mount["name"]]
    return dict(found)


def test_the_daemon_finds_the_relay_and_starts_none_itself() -> None:
    *command, path = RELAY["command"]
    assert command[1:] == ["-m", "migproxy.relay"]
    assert environment()["MIGPROXY_RELAY_SOCKET"]["value"] == path
    assert environment()["MIGPROXY_RELAY_EXTERNALLY_MANAGED"]["value"] == "true"
    (shared,) = RELAY["volumeMounts"]
    assert Path(path).parent == Path(shared["mountPath"])
    assert shared in CONTAINER["volumeMounts"]
    assert "emptyDir" in volume(shared), "which outlives a container, and not the pod"


def test_the_relay_has_the_program_that_the_image_has() -> None:
    image = (ROOT / "Containerfile").read_text()
    program = Path(RELAY["command"][0])
    assert f'ENTRYPOINT ["{program.parent}/migproxy"]' in image
    assert RELAY["image"] == CONTAINER["image"]


def test_a_daemon_that_hangs_is_not_waited_for_as_one_that_drains_is() -> None:
    assert CONTAINER["livenessProbe"]["terminationGracePeriodSeconds"] <= 10 < POD["terminationGracePeriodSeconds"]


def test_the_relay_may_do_nothing_but_move_what_it_is_given() -> None:
    context = RELAY["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["privileged"] is False
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert not RELAY.get("env")
    assert "cpu" not in RELAY["resources"]["limits"], "which would throttle the migrations"


def test_one_container_has_the_kernel_load_its_tls_and_may_do_nothing_else() -> None:
    (container,) = POD["initContainers"]
    assert container["command"][1:] == ["-m", "migproxy.offload"]
    assert (container["image"], container["command"][0]) == (RELAY["image"], RELAY["command"][0])
    context = container["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert context["privileged"] is False
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert not container.keys() & {"env", "volumeMounts"}


def test_the_token_is_only_where_the_api_is_asked() -> None:
    assert POD["automountServiceAccountToken"] is False
    (token,) = [one for one in POD["volumes"] if "projected" in one]
    assert token["name"] not in {one["name"] for one in RELAY["volumeMounts"]}
    for container in (CONTAINER, FAILSAFE):
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == token["name"]]
        assert mount["mountPath"] == TOKEN_FOLDER
        assert mount["readOnly"] is True
    paths = {
        path
        for source in token["projected"]["sources"]
        for kind in source.values()
        for path in ([kind["path"]] if "path" in kind else [item["path"] for item in kind["items"]])
    }
    assert paths == {"token", "ca.crt", "namespace"}


def test_nobody_replaces_a_pod_that_moves_bytes_unasked() -> None:
    assert document("DaemonSet")["spec"]["updateStrategy"] == {"type": "OnDelete"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("number", range(len(DOCUMENTS)), ids=lambda number: DOCUMENTS[number]["kind"])
def test_every_object_is_valid(number: int, version: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[number], version, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_yaml(path: Path) -> None:
    assert all(yaml.safe_load_all(path.read_text()))


def test_every_flag_exists_and_has_a_good_value() -> None:
    known = {options.option(field): field for field in Settings.model_fields}
    assert set(flags()) <= set(known)
    values = {known[flag]: True if value is None else value for flag, value in flags().items()}
    options.load(values, {}, None)


def test_every_variable_exists() -> None:
    known = {variable for field in Settings.model_fields for variable in options.variables(field)}
    assert set(environment()) <= known


def test_node_and_namespace_and_address_come_from_the_pod() -> None:
    paths = {
        name: one["valueFrom"]["fieldRef"]["fieldPath"] for name, one in environment().items() if "valueFrom" in one
    }
    assert paths == {
        "MIGPROXY_NODE_NAME": "spec.nodeName",
        "MIGPROXY_KUBEVIRT_NAMESPACE": "metadata.namespace",
        "MY_POD_IP": "status.podIP",
    }


def test_every_path_is_mounted() -> None:
    """Whoever adds a setting that is a path says here where the pod has it."""
    found = {field for field in Settings.model_fields if re.search(r"_(dir|socket|file|path)$|kubeconfig", field)}
    unused = {
        "vmi_dir",  # the API server is the inventory
        "kubeconfig",  # the service account is
        "launcher_run_dir",  # in /proc: hostPID
        "libvirt_socket",  # below launcher_run_dir
        "tls_dir",  # the two folders below, and the CA from the API server
        "tls_server_dir",  # its default
        "tls_client_dir",  # its default
    }
    assert found == {"pods_dir", "control_socket", "relay_socket", *unused}
    pods = mounts()[effective("pods_dir")]
    assert volume(pods)["hostPath"]["path"] == Settings.model_fields["pods_dir"].default
    assert pods["mountPropagation"] == "HostToContainer"
    control = mounts()[str(Path(effective("control_socket")).parent)]
    assert "emptyDir" in volume(control)
    assert not control.get("readOnly")
    assert effective("launcher_run_dir").startswith("/proc/{pid}/")
    assert POD["hostPID"] is True


def test_certificates_are_mounted() -> None:
    for folder in TLS_FOLDERS:
        assert volume(mounts()[folder])["secret"]["optional"] is True
        assert mounts()[folder]["readOnly"] is True


def test_nothing_else_is_mounted() -> None:
    assert set(mounts()) == {effective("pods_dir"), "/run/migproxy", "/run/migproxy-relay", TOKEN_FOLDER, *TLS_FOLDERS}
    assert {one["name"] for one in POD["volumes"]} == {one["name"] for one in CONTAINER["volumeMounts"]}


def test_pod_outlives_the_drain() -> None:
    drain = float(effective("drain_timeout"))
    assert drain + 30 <= POD["terminationGracePeriodSeconds"]


def test_container_has_no_more_rights_than_it_needs() -> None:
    context = CONTAINER["securityContext"]
    assert context["privileged"] is False
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"]["drop"] == ["ALL"]
    assert set(context["capabilities"]["add"]) == {
        "SYS_PTRACE",
        "DAC_OVERRIDE",
        "CHOWN",
        "FOWNER",
        "SYS_RESOURCE",
    }
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not POD.get("hostNetwork")


def test_probes_ask_what_the_daemon_answers() -> None:
    probes = {kind: CONTAINER[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")}
    (port,) = CONTAINER["ports"]
    assert options.parse_listen(effective("http_listen")) == (POD_IP, port["containerPort"])
    assert not any("host" in probe["httpGet"] for probe in probes.values()), "the kubelet asks at the pod's IP"
    asked = {kind: probe["httpGet"] for kind, probe in probes.items()}
    alive, ready = {"path": "/healthz", "port": port["name"]}, {"path": "/readyz", "port": port["name"]}
    assert asked == {"startup": alive, "liveness": alive, "readiness": ready}
    # A restart ends the migrations that run: a daemon must be silent for minutes to deserve it.
    liveness = probes["liveness"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


def test_multus_makes_the_interface_that_is_looked_for() -> None:
    annotations = document("DaemonSet")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["k8s.v1.cni.cncf.io/networks"].endswith("@" + effective("migration_interface"))


def test_service_and_monitor_find_the_pods_and_their_port() -> None:
    labels = document("DaemonSet")["spec"]["template"]["metadata"]["labels"]
    (port,) = CONTAINER["ports"]
    service = document("Service")["spec"]
    assert service["selector"].items() <= labels.items()
    assert service["clusterIP"] == "None"
    assert [one["targetPort"] for one in service["ports"]] == [port["name"]]
    monitor = yaml.safe_load((ROOT / "deploy/podmonitor.yaml").read_text())["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert [one["port"] for one in monitor["podMetricsEndpoints"]] == [port["name"]]


def test_the_network_policy_is_of_these_pods_and_names_their_port() -> None:
    policy = yaml.safe_load((ROOT / "deploy/networkpolicy.yaml").read_text())
    for version in VERSIONS:
        kubernetes_validate.validate(policy, version, strict=True)
    template = document("DaemonSet")["spec"]["template"]
    assert policy["metadata"]["namespace"] == document("DaemonSet")["metadata"]["namespace"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert not POD.get("hostNetwork"), "it would have no effect"
    nodes, observers = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"] in [one["podSelector"] for one in nodes["from"]]
    assert "ports" not in nodes, "a target's ports are the kernel's choice"
    assert [one["port"] for one in observers["ports"]] == [port["name"] for port in CONTAINER["ports"]]


def test_everything_is_in_one_namespace_and_bound_to_one_account() -> None:
    account = document("ServiceAccount")["metadata"]
    namespaced = ("ServiceAccount", "Role", "RoleBinding", "DaemonSet", "Service")
    assert {document(kind)["metadata"]["namespace"] for kind in namespaced} == {account["namespace"]}
    for kind in ("RoleBinding", "ClusterRoleBinding"):
        assert document(kind)["subjects"] == [
            {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
        ]
    assert POD["serviceAccountName"] == account["name"]


def account_of(expression: str) -> re.Pattern[str]:
    """Whom a policy's expression is about."""
    (pattern,) = re.findall(r"^request\.userInfo\.username\.matches\('(.+)'\)$", expression)
    return re.compile(pattern)


def announcer() -> str:
    (validation,) = document("ValidatingAdmissionPolicy", "migproxy-announcements")["spec"]["validations"]
    return str(validation["expression"])


@pytest.mark.parametrize("name", ["migproxy", "x-migproxy", "migproxy-x", "x-migproxy-x"])
def test_the_policies_are_about_the_account_whatever_prefix_kustomize_gives_it(name: str) -> None:
    user = f"system:serviceaccount:{document('ServiceAccount')['metadata']['namespace']}:{name}"
    for policy in ("migproxy", "migproxy-events"):
        (condition,) = document("ValidatingAdmissionPolicy", policy)["spec"]["matchConditions"]
        assert account_of(condition["expression"]).search(user)
        assert account_of(condition["expression"]).search(f"system:serviceaccount:elsewhere:{name}")
    assert account_of(announcer()).search(user)
    assert not account_of(announcer()).search(f"system:serviceaccount:elsewhere:{name}")
    assert not account_of(announcer()).search("system:serviceaccount:kubevirt:kubevirt-handler")


@pytest.mark.parametrize("name", ["migproxy", "migproxy-announcements", "migproxy-events"])
def test_every_policy_is_bound(name: str) -> None:
    assert document("ValidatingAdmissionPolicyBinding", name)["spec"] == {
        "policyName": name,
        "validationActions": ["Deny"],
    }
    assert document("ValidatingAdmissionPolicy", name)["spec"]["failurePolicy"] == "Fail"


@pytest.mark.parametrize("name", ["migproxy", "migproxy-announcements"])
def test_the_policies_about_vmis_read_the_annotation(name: str) -> None:
    assert f"'{TARGET_ANNOTATION}'" in str(document("ValidatingAdmissionPolicy", name)["spec"])


def test_the_daemon_knows_the_refusal_by_the_policys_words() -> None:
    validations = document("ValidatingAdmissionPolicy", "migproxy")["spec"]["validations"]
    assert announcements._REFUSAL in [one["message"] for one in validations]


def test_events_are_of_the_reasons_that_the_program_has() -> None:
    (expression,) = (
        one["expression"]
        for one in document("ValidatingAdmissionPolicy", "migproxy-events")["spec"]["validations"]
        if "object.reason in" in one["expression"]
    )
    assert set(re.findall(r"'(\w+)'", expression)) == {LISTENING, BYPASSED, FAILED, RELAYED}


def test_kubernetes_1_30_has_every_object() -> None:
    """Only what is generally available there: the policies since 1.30."""
    groups = {one["apiVersion"] for one in DOCUMENTS}
    assert groups == {"v1", "apps/v1", "rbac.authorization.k8s.io/v1", "admissionregistration.k8s.io/v1"}


def test_rules_are_the_requests_that_are_made() -> None:
    """The suite runs with these rules, so that nothing is missing; and this keeps anything from being added."""
    rules = {
        (resource, verb)
        for kind in ("ClusterRole", "Role")
        for rule in document(kind)["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert rules == {
        *(("virtualmachineinstances", verb) for verb in ("list", "watch", "get", "patch")),
        *(("events", verb) for verb in ("create", "patch")),
        *((resource, verb) for resource in ("kubevirts", "configmaps") for verb in ("list", "watch")),
    }
    (config_maps,) = [rule for rule in document("Role")["rules"] if rule["resources"] == ["configmaps"]]
    assert config_maps["resourceNames"] == ["kubevirt-ca"]


def test_kustomization_changes_what_is_there() -> None:
    kustomization = yaml.safe_load((ROOT / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["daemonset.yaml"]
    assert kustomization["images"][0]["name"] == CONTAINER["image"].partition(":")[0]
    for patch in kustomization["patches"]:
        (operation,) = yaml.safe_load(patch["patch"])
        found: Any = document(**patch["target"])
        for part in operation["path"].split("/")[1:]:
            part = part.replace("~1", "/")
            found = found[int(part) if isinstance(found, list) else part]
        assert found == operation["value"], "as it stands, it changes nothing"


def test_kustomization_puts_the_accounts_namespace_into_the_policy() -> None:
    """As kustomize does: it splits the text at the delimiter, and exchanges one part."""
    kustomization = yaml.safe_load((ROOT / "kustomization.yaml").read_text())
    (replacement,) = kustomization["replacements"]
    assert replacement["source"] == {"kind": "ServiceAccount", "name": "migproxy", "fieldPath": "metadata.namespace"}
    (target,) = replacement["targets"]
    assert target["select"] == {"kind": "ValidatingAdmissionPolicy", "name": "migproxy-announcements"}
    assert target["fieldPaths"] == ["spec.validations.0.expression"]
    parts = announcer().split(target["options"]["delimiter"])
    assert parts[target["options"]["index"]] == kustomization["namespace"]
    parts[target["options"]["index"]] = "elsewhere"
    assert account_of(":".join(parts)).search("system:serviceaccount:elsewhere:migproxy")


def test_failsafe_reaches_what_the_daemon_reaches_and_has_no_other_rights() -> None:
    command, *arguments = FAILSAFE["args"]
    assert command == "failsafe"
    assert set(arguments) <= set(CONTAINER["args"])
    assert FAILSAFE["image"] == CONTAINER["image"]
    assert FAILSAFE["env"] == [environment()["MIGPROXY_NODE_NAME"]]
    assert all(one in CONTAINER["volumeMounts"] for one in FAILSAFE["volumeMounts"])
    locks = Path(Settings(control_socket=str(effective("control_socket"))).daemon_lock).parent
    assert str(locks) in {one["mountPath"] for one in FAILSAFE["volumeMounts"]}
    usual = CONTAINER["securityContext"] | {"capabilities": None}
    assert FAILSAFE["securityContext"] | {"capabilities": None} == usual
    capabilities = FAILSAFE["securityContext"]["capabilities"]
    assert capabilities["drop"] == ["ALL"]
    assert set(capabilities["add"]) == {"SYS_PTRACE", "DAC_OVERRIDE", "CHOWN", "FOWNER"}
