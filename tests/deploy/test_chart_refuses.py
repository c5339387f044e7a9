"""The Helm chart: values that make no sense are refused with a sentence, by helm 3 and 4."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.charts import HELMS, ChartError, render

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "both autoscalers": ("keda", {"autoscaling.enabled": True}, "two autoscalers"),
    "no replicas between": ("keda", {"keda.minReplicaCount": 9}, "at least 9 replicas"),
    "asleep for ever": ("keda", {"keda.query": ""}, "none would ever start"),
    "store not shared": ("shared-store", {"store.accessModes": ["ReadWriteOnce"]}, "ReadWriteMany"),
    "store of nobody": ("minimal", {"store.existingClaim": "merges"}, "only for store.type shared"),
    "store too small": ("minimal", {"store.size": "15Gi"}, "cannot hold lego.storeBytes"),
    "store too large": ("minimal", {"lego.storeBytes": "21.5GB"}, "storeBytes"),
    "store just too large": ("minimal", {"lego.storeBytes": 21474836481}, "cannot hold"),
    "limit of no store": ("minimal", {"store.type": "none", "lego.storeBytes": "1GiB"}, "a store that is not there"),
    "model cache not shared": ("shared-store", {"pvcExistingClaim": "", "pvcStorage": "9Gi", "pvcAccessMode": ["ReadWriteOnce"]}, "3 replicas share"),
    "cache of one node": ("shared-store", {"pvcAccessMode": ["ReadWriteOncePod"]}, "pvcAccessMode: 3 replicas share"),
    "adapters of one node": ("shared-store", {"adapters.accessModes": ["ReadWriteOnce"]}, "adapters.accessModes: 3 replicas share"),
    "scaled on one node": ("keda", {"adapters.existingClaim": "a"}, "adapters.accessModes: 8 replicas share"),
    "merges of one node": ("keda", {"store.accessModes": ["ReadWriteOnce"]}, "ReadWriteMany"),
    "two sources": ("everything", {"adapters.existingClaim": "a"}, "adapters.existingClaim is read-only"),
    "no time to drain": ("everything", {"vllmConfig.shutdownTimeout": 671}, "at least preStop"),
    "hasty liveness": ("minimal", {"livenessProbe.failureThreshold": 1}, "would restart a busy"),
    "gpus unequal": ("minimal", {"resources.requests": {"nvidia.com/gpu": 2}}, "wants them equal"),
    "gpus unlimited": ("cpu", {"resources.requests": {"amd.com/gpu": 1}}, "but no limit"),
    "too few gpus": ("minimal", {"vllmConfig.tensorParallelSize": 2}, "as many GPUs"),
    "no rollout": (
        "minimal",
        {"deploymentStrategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}},
        "no rollout can begin",
    ),
    "no model": ("minimal", {"modelURL": ""}, "name the base model"),
    "api key in plain text": ("minimal", {"vllmApiKey": "sk-secret"}, "vllmApiKey"),
    "token in plain text": ("minimal", {"hf_token": "hf_secret"}, "hf_token"),
    "secret as an argument": ("minimal", {"vllmConfig.extraArgs": ["--api-key=x"]}, "extraArgs"),
    "secret as a variable": ("minimal", {"env": [{"name": "HF_TOKEN", "value": "x"}]}, "env"),
    **{
        f"argument {spelling}": ("minimal", {"vllmConfig.extraArgs": [spelling]}, "extraArgs")
        for spelling in ("--api_key=x", "--api-k=x", "--hf_token", "--lora_modules=a=b", "-tp=4", "-tp", "--max_loras=2")
    },
    "key among the variables": ("minimal", {"env": [{"name": "VLLM_API_KEY", "valueFrom": {}}]}, "vllmApiKey.secretName"),
    "token among the variables": ("minimal", {"env": [{"name": "HF_TOKEN", "valueFrom": {}}]}, "hf_token.secretName"),
    "variable twice": ("minimal", {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env: A is there twice"),
    "digit first": ("minimal", {"fullnameOverride": "1lego"}, "set fullnameOverride"),
    "dot in a name": ("minimal", {"nameOverride": "my.llm"}, "set fullnameOverride"),
    "unknown key": ("minimal", {"replicas": 2}, "replicas"),
    "unknown key below": ("minimal", {"vllmConfig.maxModelLength": 9}, "maxModelLength"),
    "unknown setting": ("minimal", {"lego.cacheBytes": "1GiB"}, "cacheBytes"),
    "setting out of range": ("minimal", {"lego.maxAdapters": 0}, "maxAdapters"),
    "setting of another kind": ("minimal", {"lego.mergeThreads": "two"}, "mergeThreads"),
    "size that is none": ("minimal", {"lego.hostCacheBytes": "2 gigs"}, "hostCacheBytes"),
    "setting as a variable": ("minimal", {"env": [{"name": "VLLM_LEGO_RANK", "value": "8"}]}, "env"),
    "argument with a value": ("minimal", {"vllmConfig.extraArgs": ["--port=1"]}, "extraArgs"),
    "rank that vLLM lacks": ("minimal", {"vllmConfig.maxLoraRank": 10}, "maxLoraRank"),
    "port": ("minimal", {"servicePort": 65536}, "servicePort"),
    "quantity": ("minimal", {"shmSize": "8GiB"}, "shmSize"),
    "name": ("minimal", {"pvcExistingClaim": "My_Claim"}, "pvcExistingClaim"),
    "replicas": ("minimal", {"replicaCount": -1}, "replicaCount"),
    "type of store": ("minimal", {"store.type": "nfs"}, "store"),
    "digest": ("minimal", {"image.digest": "latest"}, "digest"),
    "way out of the folder": (
        "everything",
        {"adapters.download": [{"name": "../x", "repository": "a/b"}]},
        "adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("nonsense", REFUSED)
def test_nonsense_is_refused(by, nonsense):
    values, changes, said = REFUSED[nonsense]
    with pytest.raises(ChartError) as refused:
        render(values, changes, by)
    assert said in str(refused.value)
