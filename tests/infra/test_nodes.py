"""What the nodes of a cluster are told, without starting one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from infra import cluster, nodes, services
from infra.errors import BadCommand
from infra.layout import HEAD, HOSTS, RAY_HOSTS, USUAL_PORTS, Layout, check_name, folder, free_ports

OUTSIDE = {
    "PATH": "/usr/bin",
    "HOME": "/home/somebody",
    "AWS_SECRET_ACCESS_KEY": "not for the cluster",
    "https_proxy": "http://elsewhere:3128",
    "PISTE_LEDGER": "sqlite:////elsewhere",
    "MLFLOW_TRACKING_PASSWORD": "not for the cluster",
    "RAY_ADDRESS": "elsewhere:6379",
    "RAY_AUTH_TOKEN": "of another cluster",
    "RAY_testing_rpc_failure": "{}",
    "RAY_health_check_period_ms": "500",
}


def layout(isolated: bool = True) -> Layout:
    network = "198.18.1" if isolated else "127.1.1"
    ports = {**USUAL_PORTS, **{name: 20000 + i for i, name in enumerate((*RAY_HOSTS, "client"))}}
    return Layout("t", isolated, 2, {host: f"{network}.{11 + i}" for i, host in enumerate(HOSTS)}, ports)


def test_a_silent_host_is_noticed_within_the_promised_time() -> None:
    milliseconds = {key.removeprefix("RAY_health_check_"): int(v) for key, v in nodes.HEALTH_CHECKS.items()}
    checks = milliseconds["failure_threshold"]
    assert checks * (milliseconds["period_ms"] + milliseconds["timeout_ms"]) <= 12_000


def test_a_node_is_told_of_the_cluster_and_of_nothing_else_that_is_outside() -> None:
    told = nodes.of_node(layout(), "worker1", OUTSIDE)
    assert told["PISTE_LEDGER"] == "postgresql+psycopg://piste@store:5432/ledger"
    assert told["MLFLOW_TRACKING_URI"] == "http://store:5000"
    assert told["GLOO_SOCKET_IFNAME"] == "eth0"
    assert told["HOME"] == OUTSIDE["HOME"]
    assert (
        not {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "https_proxy"}
        & told.keys()
    )
    assert "RAY_ADDRESS" not in told


def test_settings_of_ray_from_outside_win_over_the_shipped_ones() -> None:
    told = nodes.of_node(layout(), HEAD, OUTSIDE)
    assert told["RAY_testing_rpc_failure"] == "{}"
    assert told["RAY_health_check_period_ms"] == "500"
    assert told["RAY_health_check_timeout_ms"] == nodes.HEALTH_CHECKS["RAY_health_check_timeout_ms"]


def test_a_command_keeps_its_own_environment_but_not_its_cluster() -> None:
    told = nodes.of_command(layout(), "client", OUTSIDE)
    assert told["AWS_SECRET_ACCESS_KEY"] == OUTSIDE["AWS_SECRET_ACCESS_KEY"]
    assert told["RAY_API_SERVER_ADDRESS"] == "http://head:8265"
    assert told["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"  # not activated
    assert told["PISTE_LEDGER"].endswith("store:5432/ledger")
    assert not {"https_proxy", "RAY_ADDRESS"} & told.keys()
    assert nodes.of_command(layout(), HEAD, OUTSIDE)["RAY_ADDRESS"] == "198.18.1.11:6379"


def test_work_goes_to_the_workers_and_every_node_can_be_named() -> None:
    commands = {host: nodes.service(layout(), host)["command"] for host in RAY_HOSTS}
    assert "--num-cpus=0" in commands[HEAD]
    assert "--head" in commands[HEAD]
    for host in RAY_HOSTS[1:]:
        assert {"--num-cpus=2", "--address=198.18.1.11:6379", f'--resources={{"{host}": 1}}'} <= {
            *commands[host]
        }


def test_on_one_host_all_is_on_loopback_and_no_port_is_taken_twice() -> None:
    shared = layout(isolated=False)
    told = nodes.shared(shared, HEAD)
    assert told["MLFLOW_TRACKING_URI"] == "http://127.1.1.14:5000"
    for host in RAY_HOSTS:
        assert "--min-worker-port=0" in nodes.service(shared, host)["command"]
    ports = free_ports(50)
    assert len(set(ports)) == 50


def test_mlflow_asks_for_its_database_without_a_password_and_answers_to_known_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "binaries", lambda: folder("t"))
    monkeypatch.setattr(services, "owner", lambda: None)
    words = services.services(layout())[1]["command"]
    assert "--backend-store-uri=postgresql+psycopg://piste@store:5432/mlflow" in words
    assert "--workers=1" in words
    assert any(word.startswith("--allowed-hosts=store:5000,") for word in words)


@pytest.mark.parametrize("name", ["", "with space", "a.b", "thirteenchars", "ä", "../up"])
def test_a_name_that_cannot_be_a_folder_and_a_namespace_is_refused(name: str) -> None:
    with pytest.raises(BadCommand, match="letters and digits"):
        check_name(name)


def test_the_path_of_rays_socket_fits() -> None:
    """With the longest name and ids: a socket's path has at most 107 bytes."""
    session = "session_2026-11-24_15-24-11_864489_4194304"
    path = f"{folder('a' * 12)}".replace(f"-{folder('a').name.rpartition('-')[2]}", "-4294967295")
    assert len(f"{path}/ray/{session}/sockets/plasma_store") <= 107


def test_a_command_on_a_host_keeps_its_own_options() -> None:
    asked = cluster.parse(["exec", "client", "ls", "--json", "-la"])
    assert (asked.host, asked.command) == ("client", ["ls", "--json", "-la"])
    assert cluster.parse(["kill", "worker1"]).text is None
    assert cluster.parse(["environment"]).host == "client"
