-- Log one invalidation and publish it: the one atomic step that "accepted" means.
--
-- KEYS  head      hash {epoch, seq} of the namespace
--       log       stream; the id of an entry is <seq>-0, its one field `f` is the frame as it was published
--       receipt   what this script answered for this id of this scope, kept a while so that a retry is logged once
-- ARGV  channel
--       epoch     taken only when the namespace has none: it lives and dies with the sequence
--       log length (about this many entries are kept), receipt lifetime in ms
--       fingerprint of the targets: the same id with other targets is a mistake, not a retry
--       PUBLISH, or in a cluster SPUBLISH
--       tails     one or more frames without their head, `"id":…}`
--
-- Returns {epoch, seq of the last frame, receivers of the last message, 1 when it had been logged before,
--          the fingerprint it was logged with}.

local head, log, receipt = KEYS[1], KEYS[2], KEYS[3]
local channel, log_length, receipt_ms, fingerprint, publish = ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local before = redis.call('GET', receipt)
if before then
  local epoch, seq, receivers, print_before = before:match('^(%S+) (%d+) (%d+) (%S*)$')
  return {epoch, tonumber(seq), tonumber(receivers), 1, print_before}
end

local epoch = redis.call('HGET', head, 'epoch')
if not epoch then
  epoch = ARGV[2]
  redis.call('HSET', head, 'epoch', epoch, 'seq', 0)
  -- Entries of a lost epoch must not be taken for entries of this one: sequences begin again at 1.
  redis.call('DEL', log)
end

local seq, receivers
for i = 7, #ARGV do
  seq = redis.call('HINCRBY', head, 'seq', 1)
  local frame = '{"v":1,"epoch":"' .. epoch .. '","seq":' .. string.format('%d', seq) .. ',' .. ARGV[i]
  local id = string.format('%d', seq) .. '-0'
  local added = redis.pcall('XADD', log, 'MAXLEN', '~', log_length, id, 'f', frame)
  if type(added) == 'table' and added.err then
    -- Somebody else wrote to the log, or put something else in its place. An invalidation that is live matters more
    -- than old ones: begin the log again. Replicas see that it no longer reaches back, and drop everything.
    redis.call('DEL', log)
    redis.call('XADD', log, 'MAXLEN', '~', log_length, id, 'f', frame)
  end
  receivers = redis.call(publish, channel, frame)
end

redis.call('SET', receipt, epoch .. ' ' .. string.format('%d', seq) .. ' ' .. receivers .. ' ' .. fingerprint,
           'PX', receipt_ms)
return {epoch, seq, receivers, 0, fingerprint}
