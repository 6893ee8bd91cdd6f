-- resource.customizations.health.finetune.dev_FineTuneJob in argocd-cm
local hs = {status = "Progressing", message = "waits for the operator"}
if obj.metadata.deletionTimestamp ~= nil then
  hs.message = "is being deleted"
  return hs
end
if obj.status == nil or obj.status.observedGeneration ~= obj.metadata.generation and obj.status.finishedAt == nil then
  return hs
end
hs.message = obj.status.phase
for _, condition in ipairs(obj.status.conditions or {}) do
  if condition.type == "Failed" and condition.status == "True" then
    return {status = "Degraded", message = condition.reason .. ": " .. (condition.message or "")}
  end
  if condition.type == "Succeeded" and condition.status == "True" then
    return {status = "Healthy", message = condition.message}
  end
  if condition.type == "Suspended" and condition.status == "True" then
    hs = {status = "Suspended", message = condition.message}
  end
end
if obj.status.phase == "Queued" and obj.status.queue ~= nil then
  hs.message = obj.status.queue.message
elseif obj.status.phase == "Training" and obj.status.progress ~= nil then
  hs.message = "Training " .. tostring(obj.status.progress.percent) .. "%"
end
return hs
