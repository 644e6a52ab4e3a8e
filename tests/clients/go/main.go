// Calls Greeter/Hello with grpc-go over xDS. tests/clients/README.md says what it does.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"io"
	"log"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds"
)

// codec passes the bytes of a message on as they are.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

func encode(name string) []byte {
	return append([]byte{0x0a, byte(len(name))}, name...)
}

// decode returns the string fields of a message by number; every one of them is shorter than 128 bytes.
func decode(message []byte) map[byte]string {
	fields := map[byte]string{}
	for len(message) > 0 {
		end := 2 + int(message[1])
		fields[message[0]>>3] = string(message[2:end])
		message = message[end:]
	}
	return fields
}

type stats struct {
	sync.Mutex `json:"-"`
	Ok         int            `json:"ok"`
	Failed     int            `json:"failed"`
	By         map[string]int `json:"by"`
	Errors     map[string]int `json:"errors"`
}

func (s *stats) add(instance string, err error) {
	s.Lock()
	defer s.Unlock()
	if err != nil {
		s.Failed++
		s.Errors[status.Code(err).String()+": "+status.Convert(err).Message()]++
		return
	}
	s.Ok++
	s.By[instance]++
}

func (s *stats) report() {
	s.Lock()
	defer s.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(s)
}

func main() {
	target := flag.String("target", "", "whom to call")
	concurrency := flag.Int("concurrency", 8, "callers")
	rate := flag.Float64("rate", 500, "calls a second, of all callers together")
	flag.Parse()

	connection, err := grpc.NewClient(*target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.WaitForReady(true)))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()

	counts := &stats{By: map[string]int{}, Errors: map[string]int{}}
	stop := make(chan struct{})
	var stopped atomic.Bool
	pause := time.Duration(float64(time.Second) * float64(*concurrency) / *rate)
	callUntilStopped := func(due time.Time) {
		for {
			select {
			case <-stop:
			case <-time.After(time.Until(due)):
			}
			if stopped.Load() {
				return
			}
			if due = due.Add(pause); due.Before(time.Now()) {
				due = time.Now()
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			var reply []byte
			err := connection.Invoke(ctx, "/greeter.v1.Greeter/Hello", encode("go"), &reply)
			cancel()
			counts.add(decode(reply)[2], err)
		}
	}

	var callers sync.WaitGroup
	start := time.Now()
	for first := range *concurrency {
		callers.Go(func() { callUntilStopped(start.Add(pause * time.Duration(first) / time.Duration(*concurrency))) })
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stopped.Store(true)
		close(stop)
	}()
	reports := time.NewTicker(100 * time.Millisecond)
	for {
		select {
		case <-reports.C:
			counts.report()
		case <-stop:
			callers.Wait()
			counts.report()
			return
		}
	}
}
