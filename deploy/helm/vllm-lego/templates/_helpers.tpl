{{- define "vllm-lego.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "vllm-lego.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "vllm-lego.commonLabels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "vllm-lego.labels" -}}
{{ include "vllm-lego.selector" . }}
{{ include "vllm-lego.commonLabels" . }}
{{- end }}

{{- define "vllm-lego.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end }}
{{- end }}

{{- define "vllm-lego.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "vllm-lego.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "vllm-lego.servedModelName" -}}
{{ default (required "modelURL: name the base model" .Values.modelURL) .Values.servedModelName }}
{{- end }}

{{- /* The most pods that may run at the same time, rollouts aside. */ -}}
{{- define "vllm-lego.maxReplicas" -}}
{{- if .Values.keda.enabled }}{{ .Values.keda.maxReplicaCount }}
{{- else if .Values.autoscaling.enabled }}{{ .Values.autoscaling.maxReplicas }}
{{- else }}{{ .Values.replicaCount }}{{ end }}
{{- end }}

{{- /* The value that says of a claim that only the pods of one node can mount it; "" if there is none. */ -}}
{{- define "vllm-lego.exclusiveClaim" -}}
{{- $v := .Values -}}
{{- range list
  (list "adapters.accessModes" $v.adapters.existingClaim $v.adapters.accessModes)
  (list "pvcAccessMode" (default $v.pvcStorage $v.pvcExistingClaim) $v.pvcAccessMode) }}
{{- $modes := index . 2 }}
{{- if and (index . 1) (not (or (has "ReadWriteMany" $modes) (has "ReadOnlyMany" $modes))) }}{{ index . 0 }} {{ end }}
{{- end }}
{{- end }}

{{- /* Of either autoscaler. */ -}}
{{- define "vllm-lego.scalingBehavior" -}}
scaleDown: # a new pod needs minutes to start, so do not hurry to end one
  stabilizationWindowSeconds: 600
{{- end }}

{{- define "vllm-lego.gracePeriod" -}}
{{- $least := add .Values.preStopSleepSeconds .Values.vllmConfig.shutdownTimeout -}}
{{ default (add $least 30) .Values.terminationGracePeriodSeconds | int64 }}
{{- end }}

{{- /* A number of bytes: 1.5Ti, as Kubernetes writes it, 20GiB and 20GB, as the plugin does, or digits. */ -}}
{{- define "vllm-lego.bytes" -}}
{{- $text := ternary (. | toString) (. | int64 | toString) (kindIs "string" .) | upper | replace " " "" | trimSuffix "B" -}}
{{- $digits := regexFind "^[0-9.]+" $text -}}
{{- $powers := dict "" 1 "K" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "KI" 1024 "MI" 1048576 "GI" 1073741824 "TI" 1099511627776 -}}
{{- mulf (float64 $digits) (get $powers (trimPrefix $digits $text)) | int64 -}}
{{- end }}

{{- /* The plugin's settings as variables: lego's values, and those that follow from other values. */ -}}
{{- define "vllm-lego.settings" -}}
{{- $settings := dict -}}
{{- if or .Values.adapters.existingClaim .Values.adapters.download }}{{ $_ := set $settings "adapterDir" "/adapters" }}{{ end -}}
{{- if ne .Values.store.type "none" }}{{ $_ := set $settings "storeDir" "/store" }}{{ end -}}
{{- if .Values.policy }}{{ $_ := set $settings "policyFile" "/etc/vllm-lego/policy.toml" }}{{ end -}}
{{- range $name, $value := .Values.lego }}
{{- if not (kindIs "invalid" $value) }}{{ $_ := set $settings $name $value }}{{ end -}}
{{- end -}}
{{- range $name, $value := $settings }}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value = int64 $value }}{{ end }}
- name: VLLM_LEGO_{{ $name | snakecase | upper }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "vllm-lego.apiKeyEnv" -}}
{{- with .Values.vllmApiKey -}}
{{- if .secretName -}}
- name: VLLM_API_KEY
  valueFrom: {secretKeyRef: {name: {{ .secretName }}, key: {{ .secretKey }}}}
{{- end }}
{{- end }}
{{- end }}

{{- define "vllm-lego.hubEnv" -}}
- {name: HOME, value: /home/vllm}
- {name: HF_HOME, value: /models/huggingface}
{{- with .Values.hf_token }}
{{- if .secretName }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .secretName }}, key: {{ .secretKey }}}}
{{- end }}
{{- end }}
{{- end }}

{{- /* Takes a list: the context, and whether adapters may be put into /adapters. */ -}}
{{- define "vllm-lego.volumeMounts" -}}
{{- $fill := index . 1 -}}
{{- with index . 0 -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/vllm}
- {name: cache, mountPath: /home/vllm/.cache} # a volume of the image, else made anew by the runtime
- {name: shm, mountPath: /dev/shm}
- {name: models, mountPath: /models}
- name: adapters
  mountPath: /adapters
  {{- with .Values.adapters.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
  {{- if or .Values.adapters.existingClaim (not $fill) }}
  readOnly: true
  {{- end }}
{{- if ne .Values.store.type "none" }}
- {name: store, mountPath: /store}
{{- end }}
{{- if .Values.policy }}
- {name: policy, mountPath: /etc/vllm-lego, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A claim, or else a folder of the pod. Takes a list: claim name, size of the folder. */ -}}
{{- define "vllm-lego.claimOrFolder" -}}
{{- $claim := index . 0 -}}
{{- $size := index . 1 -}}
{{- if $claim -}}
persistentVolumeClaim: {claimName: {{ $claim }}}
{{- else if $size -}}
emptyDir: {sizeLimit: {{ $size }}}
{{- else -}}
emptyDir: {}
{{- end }}
{{- end }}
