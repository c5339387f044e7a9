{{- /* What a schema cannot see: values that contradict each other. */ -}}
{{- define "vllm-lego.checks" -}}
{{- $v := .Values -}}
{{- $replicas := include "vllm-lego.maxReplicas" . | int -}}
{{- if and $v.autoscaling.enabled $v.keda.enabled }}
{{- fail "autoscaling.enabled and keda.enabled: two autoscalers would fight over one Deployment; enable one" }}
{{- end }}
{{- if and $v.keda.enabled (not (int $v.keda.minReplicaCount)) (not $v.keda.query) }}
{{- fail "keda.minReplicaCount 0: without a pod nobody reports waiting requests, so none would ever start; set it to 1, or keda.query to what a router reports" }}
{{- end }}
{{- range $scaler := list (list "autoscaling" $v.autoscaling.minReplicas $v.autoscaling.maxReplicas) (list "keda" $v.keda.minReplicaCount $v.keda.maxReplicaCount) }}
{{- if gt (index $scaler 1 | int) (index $scaler 2 | int) }}
{{- fail (printf "%s: at least %v replicas is more than at most %v" (index $scaler 0) (index $scaler 1) (index $scaler 2)) }}
{{- end }}
{{- end }}
{{- if and (eq $v.store.type "shared") (not (has "ReadWriteMany" $v.store.accessModes)) }}
{{- fail "store.type shared: pods on several nodes write it, so store.accessModes must have ReadWriteMany; without such a storage class set store.type to pod" }}
{{- end }}
{{- if and $v.store.existingClaim (ne $v.store.type "shared") }}
{{- fail (printf "store.existingClaim %s is only for store.type shared, not %s" $v.store.existingClaim $v.store.type) }}
{{- end }}
{{- $seen := list }}
{{- range $v.env }}
{{- if has .name (list "VLLM_API_KEY" "HF_TOKEN") }}
{{- fail (printf "env: %s is not set here but by %s.secretName and secretKey, since others than the server need it, too" .name (ternary "hf_token" "vllmApiKey" (eq .name "HF_TOKEN"))) }}
{{- else if has .name $seen }}
{{- fail (printf "env: %s is there twice; leave one" .name) }}
{{- end }}
{{- $seen = append $seen .name }}
{{- end }}
{{- $name := include "vllm-lego.fullname" . }}
{{- if not (regexMatch "^[a-z][a-z0-9-]*$" $name) }}
{{- fail (printf "%s cannot be the name of a Service, which begins with a letter and has letters, digits and - only; set fullnameOverride" $name) }}
{{- end }}
{{- $storeBytes := $v.lego.storeBytes }}
{{- if eq $v.store.type "none" }}
{{- if and (not (kindIs "invalid" $storeBytes)) (not $v.lego.storeDir) }}
{{- fail "lego.storeBytes limits a store that is not there; set store.type, or drop it" }}
{{- end }}
{{- else if not $v.store.existingClaim }}
{{- $limit := ternary "16GiB" $storeBytes (kindIs "invalid" $storeBytes) }}
{{- if lt (include "vllm-lego.bytes" $v.store.size | int64) (include "vllm-lego.bytes" $limit | int64) }}
{{- fail (printf "store.size %v cannot hold lego.storeBytes, %v; raise the one or lower the other" $v.store.size $limit) }}
{{- end }}
{{- end }}
{{- if and $v.adapters.existingClaim $v.adapters.download }}
{{- fail "adapters.existingClaim is read-only, so adapters.download cannot fill it; set one of the two" }}
{{- end }}
{{- with include "vllm-lego.exclusiveClaim" . | trim }}
{{- if gt $replicas 1 }}
{{- fail (printf "%s: %d replicas share a claim that one node can mount; use a ReadWriteMany claim and say so there, or have one replica, or leave the claim out, and each pod downloads for itself" . $replicas) }}
{{- end }}
{{- end }}
{{- $least := add $v.preStopSleepSeconds $v.vllmConfig.shutdownTimeout 10 }}
{{- $grace := include "vllm-lego.gracePeriod" . | int64 }}
{{- if lt $grace $least }}
{{- fail (printf "terminationGracePeriodSeconds %d would kill the server before it has drained; it must be at least preStopSleepSeconds + vllmConfig.shutdownTimeout + 10 = %d" $grace $least) }}
{{- end }}
{{- with $v.readinessProbe }}
{{- $window := mul .periodSeconds .failureThreshold }}
{{- if le (mul $v.livenessProbe.periodSeconds $v.livenessProbe.failureThreshold) $window }}
{{- fail (printf "livenessProbe would restart a busy server within %d s, when readinessProbe has only just taken it out; raise its failureThreshold" $window) }}
{{- end }}
{{- end }}
{{- $gpus := 0 }}
{{- range $name, $limit := $v.resources.limits }}
{{- if and (contains "/" $name) (not (kindIs "invalid" $limit)) }}
{{- $request := get (default dict $v.resources.requests) $name }}
{{- if and $request (ne (toString $request) (toString $limit)) }}
{{- fail (printf "resources: %s has request %v and limit %v; Kubernetes wants them equal" $name $request $limit) }}
{{- end }}
{{- $gpus = add $gpus (int64 $limit) }}
{{- end }}
{{- end }}
{{- range $name, $request := $v.resources.requests }}
{{- if and (contains "/" $name) $request (not (get (default dict $v.resources.limits) $name)) }}
{{- fail (printf "resources: %s has request %v but no limit; Kubernetes wants them equal" $name $request) }}
{{- end }}
{{- end }}
{{- if and $gpus (gt (int64 $v.vllmConfig.tensorParallelSize) $gpus) }}
{{- fail (printf "vllmConfig.tensorParallelSize %v needs as many GPUs, resources.limits has %d" $v.vllmConfig.tensorParallelSize $gpus) }}
{{- end }}
{{- with $v.deploymentStrategy.rollingUpdate }}
{{- if and (eq (toString .maxSurge) "0") (eq (toString .maxUnavailable) "0") }}
{{- fail "deploymentStrategy.rollingUpdate: with maxSurge 0 and maxUnavailable 0 no rollout can begin" }}
{{- end }}
{{- end }}
{{- end }}
