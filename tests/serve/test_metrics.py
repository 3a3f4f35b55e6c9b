"""Metrics in Prometheus' text format, told apart by adapter, bounded in number."""

from __future__ import annotations

from lorakeet.serve.metrics import MOST_LABELS, ServerMetrics


def test_the_page() -> None:
    metrics = ServerMetrics()
    metrics.add("requests", adapter="a", outcome="done")
    metrics.add("requests", 2, adapter="a", outcome="done")
    metrics.add("written", 5, adapter='say "b"\\')
    for seconds in (0.02, 0.3, 99.0):
        metrics.observe("first", seconds, adapter="a")
    lines = metrics.text({"running_texts": 3}).splitlines()
    assert 'lorakeet_requests_total{adapter="a",outcome="done"} 3' in lines
    assert 'lorakeet_generated_tokens_total{adapter="say \\"b\\"\\\\"} 5' in lines
    assert "# TYPE lorakeet_time_to_first_token_seconds histogram" in lines
    buckets = [line for line in lines if "_bucket" in line]
    assert [line.rpartition(" ")[2] for line in buckets] == ["0", "0", *["1"] * 4, *["2"] * 7, "3"]
    assert 'lorakeet_time_to_first_token_seconds_bucket{adapter="a",le="+Inf"} 3' in buckets
    assert 'lorakeet_time_to_first_token_seconds_count{adapter="a"} 3' in lines
    assert lines[-1] == "lorakeet_running_texts 3"


def test_labels_are_bounded() -> None:
    metrics = ServerMetrics()
    for number in range(MOST_LABELS + 50):
        metrics.add("requests", adapter=f"a{number}")
    page = metrics.text({})
    assert page.count("lorakeet_requests_total{") == MOST_LABELS + 1
    assert 'lorakeet_requests_total{adapter="(others)"} 50' in page


def test_only_what_may_be_seen_is_reported() -> None:
    metrics = ServerMetrics()
    for adapter in ("a", "b", "a+b"):
        metrics.add("requests", adapter=adapter)
        metrics.observe("first", 1.0, adapter=adapter)
    page = metrics.text({}, lambda name: name == "a")
    assert 'requests_total{adapter="a"} 1' in page and 'count{adapter="a"} 1' in page
    assert 'adapter="b"' not in page and "a+b" not in page
